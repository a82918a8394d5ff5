"""Model families (`spec`), sizes without weights (`shapes`), and loading (`loading`)."""
