"""The words of `fastft.data.arithmetic`: instructions, names, things, and the ways to tell a problem."""

from typing import Literal, NamedTuple

Language = Literal["en", "zh"]


class Wording(NamedTuple):
    """One way to tell a problem.  `{a} {b} {c}` are its numbers, `{r}` is the answer."""

    story: str
    question: str
    conclusion: str


INSTRUCTIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Solve the problem. Write one calculation on each line and then the answer after ####.",
        "Work out the answer step by step. End with #### and the number.",
        "Read the story and answer the question. Show every calculation and put the result after ####.",
    ),
    "zh": (
        "请解答这道应用题。每行写一步算式，最后在 #### 后面写出答案。",
        "请一步一步地计算，最后用 #### 写出得数。",
        "读一读下面的故事，回答问题。写出每一步算式，再把结果写在 #### 后面。",
    ),
}
NAMES: dict[Language, tuple[str, ...]] = {
    "en": ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Jack", "Emma", "Leo", "Nora", "Max", "Ruby"),
    "zh": ("小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小燕", "小强", "小美", "小龙", "小雨"),
}
ENGLISH_ITEMS = (
    "apples", "pencils", "books", "stickers", "marbles", "cards", "eggs", "cookies", "coins", "stamps", "balloons",
    "shells",
)  # fmt: skip
ENGLISH_BOXES = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"))
CHINESE_ITEMS = (
    ("个", "苹果"), ("支", "铅笔"), ("本", "书"), ("张", "贴纸"), ("颗", "弹珠"), ("张", "卡片"), ("个", "鸡蛋"),
    ("块", "饼干"), ("枚", "硬币"), ("张", "邮票"), ("个", "气球"), ("个", "贝壳"),
)  # fmt: skip
"""(measure word, thing)."""
CHINESE_BOXES = ("盒", "袋", "篮", "箱")

WORDINGS: dict[Language, dict[str, tuple[Wording, ...]]] = {
    "en": {
        "+": (
            Wording(
                "{name} has {a} {item}. {other} gives {name} {b} more {item}.",
                "How many {item} does {name} have now?",
                "Now {name} has {r} {item}.",
            ),
            Wording(
                "A {box} holds {a} red {item} and {b} blue {item}.",
                "How many {item} does the {box} hold in total?",
                "The {box} holds {r} {item} in total.",
            ),
        ),
        "-": (
            Wording(
                "{name} has {a} {item} and gives {b} {item} to {other}.",
                "How many {item} does {name} have left?",
                "{name} has {r} {item} left.",
            ),
            Wording(
                "{name} has {a} {item}, but {other} has only {b} {item}.",
                "How many more {item} does {name} have than {other}?",
                "{name} has {r} more {item} than {other}.",
            ),
        ),
        "×": (
            Wording(
                "{name} has {a} {boxes}. There are {b} {item} in each {box}.",
                "How many {item} does {name} have?",
                "{name} has {r} {item}.",
            ),
            Wording(
                "For {a} days {name} collects {b} {item} every day.",
                "How many {item} does {name} collect?",
                "{name} collects {r} {item}.",
            ),
        ),
        "++": (
            Wording(
                "{name} has {a} {item}, {other} has {b} {item} and their teacher has {c} {item}.",
                "How many {item} do they have together?",
                "Together they have {r} {item}.",
            ),
            Wording(
                "{name} finds {a} {item} on Monday, {b} {item} on Tuesday and {c} {item} on Friday.",
                "How many {item} does {name} find in the three days?",
                "{name} finds {r} {item} in the three days.",
            ),
        ),
        "+-": (
            Wording(
                "{name} has {a} {item}. {name} buys {b} more {item} and then gives {c} {item} to {other}.",
                "How many {item} does {name} have left?",
                "{name} has {r} {item} left.",
            ),
            Wording(
                "There are {a} {item} on the table. {name} puts {b} more {item} there and {other} takes {c} away.",
                "How many {item} are on the table now?",
                "Now {r} {item} are on the table.",
            ),
        ),
        "-+": (
            Wording(
                "{name} has {a} {item}. {name} loses {b} {item} and later finds {c} {item}.",
                "How many {item} does {name} have now?",
                "Now {name} has {r} {item}.",
            ),
            Wording(
                "A shop has {a} {item}. It sells {b} {item} in the morning and gets {c} new {item} in the evening.",
                "How many {item} does the shop have now?",
                "Now the shop has {r} {item}.",
            ),
        ),
        "--": (
            Wording(
                "{name} has {a} {item}. {name} gives {b} {item} to {other} and {c} {item} to a friend.",
                "How many {item} does {name} have left?",
                "{name} has {r} {item} left.",
            ),
            Wording(
                "A shop has {a} {item}. It sells {b} {item} on Monday and {c} {item} on Tuesday.",
                "How many {item} are left in the shop?",
                "{r} {item} are left in the shop.",
            ),
        ),
        "×+": (
            Wording(
                "{name} has {a} {boxes} with {b} {item} in each {box}, and {c} more {item} on the table.",
                "How many {item} does {name} have in all?",
                "{name} has {r} {item} in all.",
            ),
            Wording(
                "{name} buys {a} {boxes} of {b} {item} each. {other} gives {name} {c} more {item}.",
                "How many {item} does {name} have now?",
                "Now {name} has {r} {item}.",
            ),
        ),
        "×-": (
            Wording(
                "{name} has {a} {boxes} with {b} {item} in each {box} and gives {c} {item} to {other}.",
                "How many {item} does {name} have left?",
                "{name} has {r} {item} left.",
            ),
            Wording(
                "A teacher buys {a} {boxes} of {b} {item} each and hands out {c} {item} in class.",
                "How many {item} does the teacher keep?",
                "The teacher keeps {r} {item}.",
            ),
        ),
        "+×": (
            Wording(
                "Each {box} holds {a} red {item} and {b} blue {item}. {name} has {c} {boxes}.",
                "How many {item} does {name} have?",
                "{name} has {r} {item}.",
            ),
            Wording(
                "Every day {name} collects {a} {item} and {other} collects {b} {item}. They do so for {c} days.",
                "How many {item} do they collect?",
                "They collect {r} {item}.",
            ),
        ),
    },
    "zh": {
        "+": (
            Wording(
                "{name}有{a}{m}{item}，{other}又给了{name}{b}{m}{item}。",
                "{name}现在有多少{m}{item}？",
                "{name}现在有{r}{m}{item}。",
            ),
            Wording(
                "一{box}里有{a}{m}红色的{item}和{b}{m}蓝色的{item}。",
                "这一{box}里一共有多少{m}{item}？",
                "这一{box}里一共有{r}{m}{item}。",
            ),
        ),
        "-": (
            Wording(
                "{name}有{a}{m}{item}，送给{other}{b}{m}{item}。",
                "{name}还剩多少{m}{item}？",
                "{name}还剩{r}{m}{item}。",
            ),
            Wording(
                "{name}有{a}{m}{item}，而{other}只有{b}{m}{item}。",
                "{name}比{other}多多少{m}{item}？",
                "{name}比{other}多{r}{m}{item}。",
            ),
        ),
        "×": (
            Wording(
                "{name}有{a}{box}{item}，每{box}有{b}{m}{item}。",
                "{name}有多少{m}{item}？",
                "{name}有{r}{m}{item}。",
            ),
            Wording(
                "{name}连续{a}天，每天收集{b}{m}{item}。",
                "{name}收集了多少{m}{item}？",
                "{name}收集了{r}{m}{item}。",
            ),
        ),
        "++": (
            Wording(
                "{name}有{a}{m}{item}，{other}有{b}{m}{item}，老师有{c}{m}{item}。",
                "他们一共有多少{m}{item}？",
                "他们一共有{r}{m}{item}。",
            ),
            Wording(
                "{name}星期一找到{a}{m}{item}，星期二找到{b}{m}{item}，星期五找到{c}{m}{item}。",
                "{name}三天一共找到多少{m}{item}？",
                "{name}三天一共找到{r}{m}{item}。",
            ),
        ),
        "+-": (
            Wording(
                "{name}有{a}{m}{item}，又买了{b}{m}{item}，然后送给{other}{c}{m}{item}。",
                "{name}还剩多少{m}{item}？",
                "{name}还剩{r}{m}{item}。",
            ),
            Wording(
                "桌子上有{a}{m}{item}，{name}又放了{b}{m}{item}，{other}拿走了{c}{m}{item}。",
                "桌子上现在有多少{m}{item}？",
                "桌子上现在有{r}{m}{item}。",
            ),
        ),
        "-+": (
            Wording(
                "{name}有{a}{m}{item}，丢了{b}{m}{item}，后来又找到{c}{m}{item}。",
                "{name}现在有多少{m}{item}？",
                "{name}现在有{r}{m}{item}。",
            ),
            Wording(
                "商店里有{a}{m}{item}，上午卖出{b}{m}{item}，下午又运来{c}{m}{item}。",
                "商店里现在有多少{m}{item}？",
                "商店里现在有{r}{m}{item}。",
            ),
        ),
        "--": (
            Wording(
                "{name}有{a}{m}{item}，送给{other}{b}{m}{item}，又送给朋友{c}{m}{item}。",
                "{name}还剩多少{m}{item}？",
                "{name}还剩{r}{m}{item}。",
            ),
            Wording(
                "商店里有{a}{m}{item}，星期一卖出{b}{m}{item}，星期二卖出{c}{m}{item}。",
                "商店里还剩多少{m}{item}？",
                "商店里还剩{r}{m}{item}。",
            ),
        ),
        "×+": (
            Wording(
                "{name}有{a}{box}{item}，每{box}有{b}{m}，桌子上还有{c}{m}{item}。",
                "{name}总共有多少{m}{item}？",
                "{name}总共有{r}{m}{item}。",
            ),
            Wording(
                "{name}买了{a}{box}{item}，每{box}{b}{m}，{other}又给了{name}{c}{m}{item}。",
                "{name}现在有多少{m}{item}？",
                "{name}现在有{r}{m}{item}。",
            ),
        ),
        "×-": (
            Wording(
                "{name}有{a}{box}{item}，每{box}有{b}{m}，送给{other}{c}{m}{item}。",
                "{name}还剩多少{m}{item}？",
                "{name}还剩{r}{m}{item}。",
            ),
            Wording(
                "老师买了{a}{box}{item}，每{box}{b}{m}，在班上发了{c}{m}{item}。",
                "老师还剩多少{m}{item}？",
                "老师还剩{r}{m}{item}。",
            ),
        ),
        "+×": (
            Wording(
                "每{box}里有{a}{m}红色的{item}和{b}{m}蓝色的{item}，{name}有{c}{box}。",
                "{name}有多少{m}{item}？",
                "{name}有{r}{m}{item}。",
            ),
            Wording(
                "每天{name}收集{a}{m}{item}，{other}收集{b}{m}{item}，他们收集了{c}天。",
                "他们收集了多少{m}{item}？",
                "他们收集了{r}{m}{item}。",
            ),
        ),
    },
}
