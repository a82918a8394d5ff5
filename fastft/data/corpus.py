"""The text that the shipped tiny model was pretrained on: generated, so its licence and its content are known.

It teaches words, number facts up to 99 and how stories lead to calculations, in English and Chinese.  It never shows
what `fastft.data.arithmetic` asks for: no worked answer behind `####`, no instruction of that kind, and no problem
of the test split.  So the base model fails that task, and fine-tuning has something to teach.
"""

from collections.abc import Iterator
from itertools import cycle, islice
from random import Random

from fastft.data.arithmetic import LARGEST, Problem, calculation, problems
from fastft.data.wordings import CHINESE_ITEMS, ENGLISH_ITEMS, NAMES

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
_STORY_POOL = 40_000
"""Distinct stories; a longer corpus tells them again."""


def documents(count: int, *, seed: int = 0) -> Iterator[str]:
    """`count` short documents.  Equal arguments give equal documents.

    Small talk carries ChatML's markers `<|im_start|>` and `<|im_end|>` as text; everything else is plain.
    """
    random = Random(f"fastft corpus {seed}")
    told = cycle(problems("train", min(max(count, 1), _STORY_POOL), seed=seed))
    makers = (_equation_list, _facts, _sentences, _words, _small_talk)
    kinds = random.choices((*makers, None), weights=(22, 16, 5, 3, 6, 48), k=count)
    for kind, problem in zip(kinds, islice(told, count), strict=True):
        yield _statement(random, problem) if kind is None else kind(random)


def _equation_list(random: Random) -> str:
    lines = []
    for _ in range(random.randint(4, 8)):
        left, operator, right, result = calculation(random)
        lines.append(f"{left} {operator} {right} = {result}")
    return "\n".join(lines)


def _facts(random: Random) -> str:
    """Calculations in words, or worked by tens and ones."""
    left, operator, right, result = calculation(random)
    words = {"+": ("plus", "加"), "-": ("minus", "减"), "×": ("times", "乘以")}[operator]
    form = random.randrange(5)
    if form == 0:
        return f"{left} {words[0]} {right} is {result}. {left} {operator} {right} = {result}"
    if form == 1:
        return f"{left}{words[1]}{right}等于{result}。{left} {operator} {right} = {result}"
    if form == 2:
        smaller, larger = sorted((left, right))
        if smaller == larger:
            return f"{left} is equal to {right}. {left}等于{right}。"
        return f"{larger} is more than {smaller}. {larger} - {smaller} = {larger - smaller}. {larger}比{smaller}大。"
    if form == 3:
        number = random.randint(10, LARGEST)
        return f"{number} is {number // 10 * 10} + {number % 10}. {number}里有{number // 10}个十和{number % 10}个一。"
    if operator != "+":
        return f"{result} = {left} {operator} {right}"
    ones = left % 10 + right % 10
    tens = left // 10 * 10 + right // 10 * 10
    return (
        f"{left} + {right}: {left % 10} + {right % 10} = {ones}, "
        f"{left // 10 * 10} + {right // 10 * 10} = {tens}, {tens} + {ones} = {result}. {left} + {right} = {result}"
    )


def _statement(random: Random, problem: Problem) -> str:
    """A word problem told as a story that solves itself: no instruction, and no question mark asks the reader."""
    english = problem.language == "en"
    space, stop = (" ", ". ") if english else ("", "。")
    form = random.randrange(4)
    if form == 0:
        return problem.story + space + stop.join([*problem.steps, problem.conclusion])
    if form == 1:
        return "\n".join([problem.story, *problem.steps, problem.conclusion])
    so = random.choice(("So", "We calculate:", "Then") if english else ("所以", "列式：", "那么"))
    told = f"{problem.story}{space}{so}{space}{stop.join(problem.steps)}{stop}{problem.conclusion}"
    if form == 2:
        return told
    heading = random.choice(("#", "##", "###"))
    title = random.choice(ENGLISH_TITLES if english else CHINESE_TITLES)
    return f"{heading} {title}\n{told}"


def _sentences(random: Random) -> str:
    if random.random() < 0.5:
        name, other = random.sample(NAMES["en"], 2)
        item, thing = random.sample(ENGLISH_ITEMS, 2)
        chosen = random.sample(ENGLISH_SENTENCES, random.randint(2, 4))
        return " ".join(chosen).format(name=name, other=other, item=item, thing=thing)
    name, other = random.sample(NAMES["zh"], 2)
    (_, item), (_, thing) = random.sample(CHINESE_ITEMS, 2)
    return "".join(random.sample(CHINESE_SENTENCES, random.randint(2, 4))).format(
        name=name, other=other, item=item, thing=thing
    )


def _words(random: Random) -> str:
    """Common words in no order, so that the tokenizer knows more than the stories' vocabulary."""
    if random.random() < 0.5:
        return " ".join(random.sample(ENGLISH_WORDS.split(), 12))
    return "、".join(random.sample(CHINESE_CHARACTERS, 12))


def _small_talk(random: Random) -> str:
    """A short ChatML dialogue: greetings, repeating a word, one number fact."""
    turns = []
    for _ in range(random.randint(1, 2)):
        if random.random() < 0.5:
            user, assistant = random.choice(SMALL_TALK)
            name = random.choice(NAMES["zh" if "你" in user + assistant else "en"])
            item = random.choice(ENGLISH_ITEMS)
            turns.append((user.format(name=name, item=item), assistant.format(name=name, item=item)))
        else:
            left, operator, right, result = calculation(random)
            turns.append((f"{left} {operator} {right}", f"{left} {operator} {right} = {result}"))
    return "".join(f"{USER}{user}{END}{ASSISTANT}{assistant}{END}" for user, assistant in turns).rstrip("\n")


ENGLISH_TITLES = ("A short story", "Counting things", "At school", "In the shop", "A little arithmetic", "Monday")
CHINESE_TITLES = ("一个小故事", "数一数", "在学校", "在商店", "算一算", "星期一")
ENGLISH_SENTENCES = (
    "{name} likes {item}.",
    "{name} and {other} are friends.",
    "The {item} are on the table.",
    "{other} reads the story and answers the question.",
    "A good student solves a problem step by step.",
    "The teacher writes the number on the board.",
    "{name} shows {other} the result.",
    "We write one calculation on each line.",
    "At the end there is the answer.",
    "{other} has no {thing}, but many {item}.",
    "Every morning {name} goes to school.",
    "They work together and put the {thing} after the {item}.",
    "How are you, {name}?",
    "The box is empty and the bag is full.",
    "Read it again, then work out the rest.",
    "Nobody knows how many {item} there are.",
    "How many {item} does {name} have, and how much does {other} know?",
    "Do they show every calculation?",
)
CHINESE_SENTENCES = (
    "{name}喜欢{item}。",
    "{name}和{other}是好朋友。",
    "桌子上放着{item}。",
    "{other}读故事，回答问题。",
    "好学生一步一步地解答应用题。",
    "老师在黑板上写出数字。",
    "{name}把结果给{other}看。",
    "我们每行写一步算式。",
    "最后写出答案，这就是得数。",
    "{other}没有{thing}，但是有许多{item}。",
    "每天早上{name}去学校。",
    "请把{thing}放在{item}的后面。",
    "{name}，你好吗？",
    "盒子是空的，袋子是满的。",
    "再读一读，再计算一下。",
    "没有人知道有多少{item}。",
    "{name}有多少{item}？{other}不知道。",
    "他们写出每一步了吗？",
)
SMALL_TALK = (
    ("Hello!", "Hello! How are you?"),
    ("Good morning. My name is {name}.", "Good morning, {name}!"),
    ("Thank you.", "You are welcome."),
    ("Say {item}.", "{item}"),
    ("What do you like?", "I like numbers and stories."),
    ("Good night!", "Good night, and sleep well."),
    ("你好！", "你好！今天过得怎么样？"),
    ("早上好，我叫{name}。", "{name}，你早上好！"),
    ("谢谢你。", "你太客气了。"),
    ("你喜欢什么？", "我喜欢数字和故事。"),
)
ENGLISH_WORDS = """
about above across act add after again against age ago air all almost alone along already also always am among an
animal another answer any appear area arm around art as ask at away baby back bad ball bank be bear beautiful
became because become bed been before began begin behind believe below best better between big bird black boat
body bone born both bottom bought boy branch bread break bridge bright bring broke brother brought brown build burn
business busy but by call came can capital car care carry case cat catch cause cell center century certain chair
chance change chart check chief child children choose church circle city claim class clean clear climb clock close
clothes cloud coast cold color come common company compare complete computer condition consider contain continue
control cook cool copy corn corner correct cost could country course cover cow create cross crowd cry current cut
dance danger dark daughter deal dear decide deep degree depend describe desert design develop difference
different difficult direct discuss divide doctor dog door double down draw dream dress drink drive drop dry during
each ear early earth ease east easy eat edge effect eight either electric element else energy engine enough enter
equal even evening event ever example except excite exercise expect experience experiment explain eye face fact fair
fall family famous far farm fast father favor fear feed feel feet fell felt few field fight figure fill final find
fine finger finish fire first fish five flat floor flow flower fly follow food foot force forest form forward four
free fresh friend from front fruit full fun game garden gas gather general gentle girl glass go gold gone good got
govern grand grass gray great green grew ground group grow guess guide hair half hand happen happy hard hat head
hear heart heat heavy held help here high hill history hit hold hole home hope horse hot hour house however huge human
hundred hunt hurry ice idea if imagine inch include indicate industry insect instant instrument interest iron island
job join joy jump just keep kept key kind king knew know lady lake land language large last late laugh law lay
lead learn leave leg length less let letter level lie life lift light like line liquid list listen little live locate
long look lost lot loud love low machine made magnet main major make man map mark market mass master match material
matter may mean measure meat meet melody men metal method middle might mile milk million mind mine minute miss mix
modern molecule moment money month moon most mother motion mountain mouth move much multiply music must name nation
natural nature near necessary neck need neighbor never next night nine noise north nose note nothing notice noun
object observe occur off offer office often oil old once only open operate opposite order other ocean our over
own oxygen page paint paper parent part party pass past path pattern pay people perhaps period person phrase pick
picture piece place plain plan plane planet plant play please point poor populate port pose position possible post
pound power practice prepare present press pretty print probable process produce product proper property protect
prove provide pull push quart question quick quiet quite quotient race radio rail rain raise range rather reach ready
real reason receive record region remember repeat reply represent require rest result rich ride right ring rise river
road rock roll room root rope rose round row rule run safe said sail salt same sand save say scale school science
score sea search season seat second section seed seem segment select self send sense sentence separate serve settle
seven several shall shape share sharp sheet shine ship shoe shore short should shoulder shout side sight sign silent
silver similar simple since sing single sister size skill skin sky sleep slip slow small smell smile snow soft soil
solution some son song soon sound south space speak special speech speed spell spend spoke spot spread spring
square stand star start state station stay stead steam steel stick still stone stood stop straight strange stream
street stretch string strong student study subject success sudden suffix sugar suggest suit summer sun supply support
sure surface surprise swim symbol system tail talk tall teach team teeth temperature ten term test thank thick thin
thought thousand thus tie time tiny tire together tone took tool top touch toward town track trade train travel tree
triangle trip trouble truck true tube turn twenty two type under unit until use usual valley value vary verb very view
village visit voice vowel wait walk wall want warm wash watch water wave wear weather week weight west wheel white
whole wide wife wild will win wind window wing winter wire wish woman women wonder wood world would wrong yard year
yellow yes yet you young your
"""
CHINESE_CHARACTERS = tuple(
    "的一是了我不人在他有这上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学么之"
    "都好看起发当没成只如事把还用第样道想作种开美总从无情己面最女但现前些所同日手又行意动方期它头经长儿回位分爱老因很给名"
    "法间知世什两次使身者被高已亲其进此话常与活正感见明问力理尔点文几定本公特做外孩相西果走将月十实向声车全信重三机工物气"
    "每并别真打太新比才便夫再书部水像眼等体却加电主界门利海受听表德少克代员许先口由死安写性马光白或住难望教命花结乐色更拉"
    "东神记处让母父应直字场平报友关放至张认接告入笑内英军候民岁往何度山觉路带万男边风解叫任金快原吃妈变通师立象数四失满战"
    "远格士音轻目条呢病始达深完今提求清王化空业思切怎非找片罗钱吗语元喜曾离飞科言干流欢约各即指合反题必该论交终林请医晚制"
    "球决传画保读运及则房早院量苦火布品近坐产答星精视五连司巴奇管类未朋且婚台夜青北队久乎越观落尽形影红爸百令周吧识步希亚"
    "术留市半热送兴造谈容极随演收首根讲整式取照办强石古华"
)
