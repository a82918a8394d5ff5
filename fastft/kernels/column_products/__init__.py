"""The sum over rows of what two tall matrices' elements make together: one read of each, one row written."""
