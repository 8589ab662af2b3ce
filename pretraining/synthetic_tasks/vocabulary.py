"""Random words, numbers, prices, dates and codes for synthetic texts."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable

from finesight.synth.tickets import sample_pseudoword, split_words

COMMON_WORDS = split_words(
    """
    the and you that was for are with his they this have from one had word but not what all were
    when your can said there use each which she how their will other about out many then them these
    some her would make like him into time has look two more write see number way could people than
    first water been call who oil its now find long down day did get come made may part over new
    sound take only little work know place year live back give most very after thing our just name
    good sentence man think say great where help through much before line right too mean old any
    same tell boy follow came want show also around form three small set put end does another well
    large must big even such because turn here why ask went men read need land different home us
    move try kind hand picture again change off play spell air away animal house point page letter
    mother answer found study still learn should world high every near add food between own below
    country plant last school father keep tree never start city earth eye light thought head under
    story saw left few while along might close something seem next hard open example begin life
    always those both paper together got group often run important until children side feet car
    mile night walk white sea began grow took river four carry state once book hear stop without
    second later miss idea enough eat face watch far really almost let above girl sometimes mountain
    cut young talk soon list song being leave family body music color stand sun question fish area
    mark dog horse birds problem complete room knew since ever piece told usually friends easy heard
    order red door sure become top ship across today during short better best however low hours
    black products happened whole measure remember early waves reached listen wind rock space
    covered fast several hold himself toward five step morning passed vowel true hundred against
    pattern winner table north slowly money map farm pulled draw voice cold notice south sing war
    ground fall king town unit figure certain field travel wood fire upon done english road half ten
    fly gave box finally wait correct oh quickly person became shown minutes strong verb stars front
    feel fact inches street decided contain course surface produce building ocean class note nothing
    rest carefully scientists inside wheels stay green known island week less machine base ago stood
    plane system behind ran round boat game force brought understand warm common bring explain dry
    though language shape deep thousands yes clear equation yet government filled heat full hot
    check object am rule among noun power cannot able six size dark ball material special heavy fine
    pair circle include built coffee market bakery station garden kitchen bottle ticket window
    bridge orange yellow summer winter spring autumn monday friday sunday sugar butter cheese bread
    apple lemon onion tomato potato carrot pepper rice pasta chicken salad juice milk eggs soup
    cookie chocolate vanilla cream honey cereal yogurt banana cherry grape peach pear plum melon
    parking entrance exit closed caution danger private welcome reception office library museum
    hotel airport hospital pharmacy police taxi bus train metro platform gate floor stairs lift push
    pull free sale price total cash credit card pocket receipt invoice customer service thanks
    visit please repeat phone email address website folder account balance amount discount tax
    """
)

SIGN_TEXTS = split_words(
    """
    OPEN CLOSED EXIT ENTRANCE STOP SLOW YIELD SALE PUSH PULL DANGER CAUTION WARNING PARKING TAXI
    HOTEL CAFE BAKERY MARKET PHARMACY POLICE BANK LIBRARY MUSEUM TICKETS INFORMATION TOILETS LIFT
    NO|SMOKING NO|ENTRY NO|PARKING ONE|WAY KEEP|LEFT KEEP|RIGHT WET|FLOOR PLEASE|WAIT FIRE|EXIT
    FOR|SALE TO|LET STAFF|ONLY MIND|THE|GAP CASH|ONLY FREE|WIFI BUS|STOP ROAD|WORK|AHEAD
    DO|NOT|ENTER PRIVATE|PROPERTY SPEED|LIMIT BEWARE|OF|DOG NEXT|STATION GATE|A GATE|B
    """
)
"""Texts of signs, with `|` between the words of one text."""

CHINESE_CHARACTERS = (
    "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对"
    "可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公"
    "同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正"
    "名定女问力机给等几很业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并"
    "内加化由却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立马命张活难神数件安表"
    "原车白应路期叫死常提感金何更反合放做系计或司利受光王果亲界及今京务制解各任至清物台象记边共风"
    "战干接它许八特觉望直服毛林题建南度统色字请交爱让认算论百吃义科怎元社术结六功指思非流每青管夫"
    "连远资队跟带花快条院变联言权往展该领传近留红治决周保达办运武半候七必城父强步完革深区即求品士"
    "转量空甚众技轻程告江语英基派满式李息写呢识极令黄德收脸钱党倒未持取设始版双历越史商千片容研像"
    "找友孩站广改议形委早房音火际则首单据导影失拿网香似斯专石若兵弟谁校读志飞观争究包组造落视济喜"
)
"""Common Chinese characters in order of decreasing frequency."""

CHINESE_PHRASES = split_words(
    "出口 入口 营业中 休息 请勿吸烟 小心地滑 停车场 洗手间 欢迎光临 谢谢惠顾 合计 总计 现金 找零 "
    "单价 数量 收据 日期 时间 电话 地址 超市 书店 饭店 医院 学校 银行 车站 公园 图书馆 火车站 地铁 "
    "机场 茶 咖啡 牛奶 面包 米饭 面条 苹果 香蕉 水 红茶 绿茶 果汁 鸡蛋 白菜 豆腐 北京 上海 广州 "
    "天气 今天 明天 昨天 早上 晚上 春天 夏天 秋天 冬天 你好 再见 谢谢 中国 世界 学习 工作 生活 "
    "朋友 家人 老师 学生 安全第一 禁止停车 注意安全"
)

_CODE_LETTERS = "ABCDEFGHJKLMNPQRTUVWXYZ"
_CODE_DIGITS = "2346789"
_CASE_AMBIGUOUS_LETTERS = frozenset("cosuvwxz")
"""Letters whose upper and lower case differ in size only."""

_MONTHS = split_words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
_FIRST_DAY = datetime.date(1990, 1, 1)
_NUM_DAYS = 18_000
_AMBIGUOUS_CHARACTERS = frozenset("lI1|oO0-.,:/")
"""Characters that, without context, look like another character or like noise."""


def sample_word(rng: random.Random) -> str:
    """Sample a word, number or code whose characters are readable without context."""
    share = rng.random()
    if share < 0.34:
        text = _randomize_case(rng.choice(COMMON_WORDS), rng)
    elif share < 0.72:
        text = _randomize_case(sample_pseudoword(rng), rng)
    elif share < 0.80:
        text = sample_code(rng)
    else:
        text = rng.choice(NUMBER_SAMPLERS)(rng)
    return text if has_readable_case(text) else sample_word(rng)


def sample_fragment(rng: random.Random) -> str:
    """Sample one to four characters from the middle of a word.

    Characters that are ambiguous without context are excluded.
    """
    text = sample_word(rng)
    start, length = rng.randrange(len(text)), rng.randint(1, 4)
    fragment = text[start : start + length]
    return (
        fragment
        if has_readable_case(fragment) and not _AMBIGUOUS_CHARACTERS.intersection(fragment)
        else sample_fragment(rng)
    )


def has_readable_case(text: str) -> bool:
    """Return whether the case of the letters of a text is recognizable without context."""
    return not text.isalpha() or not _CASE_AMBIGUOUS_LETTERS.issuperset(text.lower())


def sample_code(rng: random.Random) -> str:
    """Sample a code of capitals and digits.

    Characters that many fonts draw identically are excluded.
    """
    parts = [
        "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 4)))
        for alphabet in rng.sample((_CODE_LETTERS, _CODE_DIGITS), 2)
    ]
    return rng.choice(("", "", "-", "/")).join(parts)


def sample_integer(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 6)))


def sample_decimal(rng: random.Random) -> str:
    """Sample a decimal number with one or two decimals.

    With three decimals, the point could be read as a thousands separator.
    """
    return f"{rng.uniform(0, 10 ** rng.randint(1, 3)):.{rng.randint(1, 2)}f}"


def sample_thousands(rng: random.Random) -> str:
    return f"{rng.randrange(1_000, 10_000_000):,}"


def sample_percentage(rng: random.Random) -> str:
    return f"{rng.randint(1, 100)}%"


def sample_price(rng: random.Random) -> str:
    """Sample a price in dollars, such as `$12.50`."""
    return f"${sample_cents(rng) / 100:.2f}"


def sample_cents(rng: random.Random) -> int:
    """Sample a price in cents."""
    return rng.randint(25, 10 ** rng.choice((3, 3, 4)))


def sample_time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


def sample_date(rng: random.Random) -> str:
    """Sample a date between 1990 and 2039 in one of four notations."""
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_NUM_DAYS))
    return rng.choice(
        (
            f"{day:%Y-%m-%d}",
            f"{day:%d/%m/%Y}",
            f"{day:%d.%m.%Y}",
            f"{day.day}-{_MONTHS[day.month - 1]}-{day.year}",
        )
    )


def sample_phone_number(rng: random.Random) -> str:
    return "-".join(f"{rng.randrange(10**digits):0{digits}}" for digits in (3, 4))


NUMBER_SAMPLERS: tuple[Callable[[random.Random], str], ...] = (
    sample_integer,
    sample_integer,
    sample_decimal,
    sample_thousands,
    sample_percentage,
    sample_price,
    sample_time,
    sample_date,
    sample_phone_number,
)


def sample_chinese(rng: random.Random) -> str:
    """Sample a Chinese phrase, or one to five random characters."""
    if rng.random() < 0.4:
        return rng.choice(CHINESE_PHRASES)
    return "".join(rng.choice(CHINESE_CHARACTERS) for _ in range(rng.randint(1, 5)))


def _randomize_case(text: str, rng: random.Random) -> str:
    share = rng.random()
    if share < 0.55:
        return text
    return text.capitalize() if share < 0.8 else text.upper()
