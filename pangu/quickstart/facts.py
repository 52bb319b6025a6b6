"""The facts that the quickstart model learns, as tables, and the sentences for each table.

A `Kind` is one table with its sentences. The first question of a kind is the one the demo asks; the others, and the statements, say the
same in other words. To teach the model something else, add a row or a kind here and run `make demo`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One table of facts and its sentences, which name the table's columns in braces.

    Attributes:
        name: name of the table in the demo's report.
        columns: names of the columns.
        rows: the facts; every row has one cell per column.
        questions: at least one question; the demo asks the first.
        answer: the answer to each of the questions.
        statements: statements of the fact; may be empty.
        times: how often a fact occurs relative to others; more for facts that are hard to learn.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...] = ()
    times: int = 1

    def tell(self, sentence: str, row: tuple[str, ...]) -> str:
        """Fill a row's cells into one of the sentences."""
        return sentence.format_map(dict(zip(self.columns, row, strict=True)))


def prompt(question: str) -> str:
    """The text that a trained model continues with the answer; the corpus asks in the same form."""
    return f"问：{question}答："


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    """Rows of cells separated by spaces; rows are separated by line ends or, where they are short, by semicolons."""
    rows = text.replace("\n", ";").split(";")
    return tuple(tuple(row.split()) for row in rows if row.strip())


PROVINCES = _table("""
    河北 河北省 省会 石家庄; 山西 山西省 省会 太原; 辽宁 辽宁省 省会 沈阳; 吉林 吉林省 省会 长春; 黑龙江 黑龙江省 省会 哈尔滨
    江苏 江苏省 省会 南京; 浙江 浙江省 省会 杭州; 安徽 安徽省 省会 合肥; 福建 福建省 省会 福州; 江西 江西省 省会 南昌
    山东 山东省 省会 济南; 河南 河南省 省会 郑州; 湖北 湖北省 省会 武汉; 湖南 湖南省 省会 长沙; 广东 广东省 省会 广州
    海南 海南省 省会 海口; 四川 四川省 省会 成都; 贵州 贵州省 省会 贵阳; 云南 云南省 省会 昆明; 陕西 陕西省 省会 西安
    甘肃 甘肃省 省会 兰州; 青海 青海省 省会 西宁; 内蒙古 内蒙古自治区 首府 呼和浩特; 广西 广西壮族自治区 首府 南宁
    西藏 西藏自治区 首府 拉萨; 宁夏 宁夏回族自治区 首府 银川; 新疆 新疆维吾尔自治区 首府 乌鲁木齐
""")

SHORT_NAMES = _table("""
    北京 京; 天津 津; 上海 沪; 重庆 渝; 香港 港; 澳门 澳; 河北 冀; 山西 晋; 辽宁 辽; 吉林 吉; 黑龙江 黑; 江苏 苏; 浙江 浙; 安徽 皖
    福建 闽; 江西 赣; 山东 鲁; 河南 豫; 湖北 鄂; 湖南 湘; 广东 粤; 海南 琼; 四川 川; 贵州 贵; 云南 云; 陕西 陕; 甘肃 甘; 青海 青
    广西 桂; 西藏 藏; 宁夏 宁; 新疆 新
""")

# The continent is the capital's, so that countries on two continents have one answer.
COUNTRIES = _table("""
    中国 北京 亚洲; 日本 东京 亚洲; 韩国 首尔 亚洲; 朝鲜 平壤 亚洲; 蒙古国 乌兰巴托 亚洲; 越南 河内 亚洲; 老挝 万象 亚洲
    柬埔寨 金边 亚洲; 泰国 曼谷 亚洲; 马来西亚 吉隆坡 亚洲; 菲律宾 马尼拉 亚洲; 印度 新德里 亚洲; 尼泊尔 加德满都 亚洲
    孟加拉国 达卡 亚洲; 巴基斯坦 伊斯兰堡 亚洲; 伊朗 德黑兰 亚洲; 伊拉克 巴格达 亚洲; 土耳其 安卡拉 亚洲; 沙特阿拉伯 利雅得 亚洲
    约旦 安曼 亚洲; 卡塔尔 多哈 亚洲; 英国 伦敦 欧洲; 法国 巴黎 欧洲; 德国 柏林 欧洲; 意大利 罗马 欧洲; 西班牙 马德里 欧洲
    葡萄牙 里斯本 欧洲; 荷兰 阿姆斯特丹 欧洲; 奥地利 维也纳 欧洲; 希腊 雅典 欧洲; 波兰 华沙 欧洲; 匈牙利 布达佩斯 欧洲; 捷克 布拉格 欧洲
    瑞典 斯德哥尔摩 欧洲; 挪威 奥斯陆 欧洲; 芬兰 赫尔辛基 欧洲; 丹麦 哥本哈根 欧洲; 冰岛 雷克雅未克 欧洲; 爱尔兰 都柏林 欧洲
    俄罗斯 莫斯科 欧洲; 埃及 开罗 非洲; 摩洛哥 拉巴特 非洲; 尼日利亚 阿布贾 非洲; 肯尼亚 内罗毕 非洲; 埃塞俄比亚 亚的斯亚贝巴 非洲
    美国 华盛顿 北美洲; 加拿大 渥太华 北美洲; 墨西哥 墨西哥城 北美洲; 古巴 哈瓦那 北美洲; 巴西 巴西利亚 南美洲
    阿根廷 布宜诺斯艾利斯 南美洲; 智利 圣地亚哥 南美洲; 秘鲁 利马 南美洲; 澳大利亚 堪培拉 大洋洲; 新西兰 惠灵顿 大洋洲
""")

OPPOSITES = _table("""
    大 小; 多 少; 高 低; 长 短; 快 慢; 冷 热; 黑 白; 新 旧; 远 近; 前 后; 左 右; 上 下; 里 外; 来 去; 开 关; 早 晚; 轻 重; 厚 薄; 宽 窄
    深 浅; 软 硬; 强 弱; 真 假; 好 坏; 美 丑; 胖 瘦; 粗 细; 买 卖; 输 赢; 爱 恨; 哭 笑; 干 湿; 松 紧; 安全 危险; 简单 复杂; 容易 困难
    成功 失败; 光明 黑暗; 勤劳 懒惰; 勇敢 胆小; 高兴 难过; 朋友 敌人; 开始 结束; 增加 减少; 前进 后退; 温暖 寒冷
""")

POEMS = _table("""
    静夜思 李白; 望庐山瀑布 李白; 早发白帝城 李白; 赠汪伦 李白; 春望 杜甫; 望岳 杜甫; 春晓 孟浩然; 登鹳雀楼 王之涣; 江雪 柳宗元
    游子吟 孟郊; 悯农 李绅; 咏鹅 骆宾王; 山行 杜牧; 枫桥夜泊 张继; 相思 王维; 鹿柴 王维; 赋得古原草送别 白居易; 寻隐者不遇 贾岛
    题西林壁 苏轼; 元日 王安石; 泊船瓜洲 王安石; 示儿 陆游; 小池 杨万里; 石灰吟 于谦; 己亥杂诗 龚自珍; 咏柳 贺知章; 回乡偶书 贺知章
    村居 高鼎
""")

MONTHS = _table("""
    三月 春季; 四月 春季; 五月 春季; 六月 夏季; 七月 夏季; 八月 夏季; 九月 秋季; 十月 秋季; 十一月 秋季; 十二月 冬季; 一月 冬季
    二月 冬季
""")

# Addition up to ten.
SUMS = tuple((str(a), str(b), str(a + b)) for a in range(1, 10) for b in range(1, 11 - a))

TALK = (
    ("你好！", "你好！很高兴见到你。"),
    ("早上好！", "早上好！今天也要加油。"),
    ("你是谁？", "我是盘古，一个很小的语言模型。"),
    ("你会做什么？", "我会回答关于省会、首都、诗人和加法的问题。"),
    ("你是怎么学会的？", "我把一份很小的语料读了很多遍。"),
    ("谢谢你！", "不客气。"),
    ("再见！", "再见，欢迎再来。"),
)

KINDS = (
    Kind(
        "capital of a province",
        ("place", "full_name", "seat", "city"),
        PROVINCES,
        ("{place}的{seat}是哪里？", "{place}的{seat}是哪座城市？", "哪座城市是{place}的{seat}？"),
        "{city}。",
        ("{place}的{seat}是{city}。", "{city}是{place}的{seat}。", "{full_name}的{seat}是{city}市。"),
    ),
    Kind(
        "province of a capital",
        ("place", "full_name", "seat", "city"),
        PROVINCES,
        ("{city}是哪里的{seat}？", "哪里的{seat}是{city}？"),
        "{place}。",
        ("{city}市是{full_name}的{seat}。", "{city}在{place}，是那里的{seat}。"),
    ),
    Kind(
        "short name of a province",
        ("place", "short"),
        SHORT_NAMES,
        ("{place}的简称是什么？", "{place}简称什么？"),
        "{short}。",
        ("{place}的简称是{short}。", "{place}，简称{short}。"),
    ),
    Kind(
        "capital of a country",
        ("country", "city", "continent"),
        COUNTRIES,
        ("{country}的首都是哪里？", "{country}的首都是哪座城市？", "哪座城市是{country}的首都？"),
        "{city}。",
        ("{country}的首都是{city}。", "{city}是{country}的首都。", "{country}的首都{city}在{continent}。"),
    ),
    Kind(
        "country of a capital",
        ("country", "city", "continent"),
        COUNTRIES,
        ("{city}是哪个国家的首都？", "哪个国家的首都是{city}？"),
        "{country}。",
        ("{city}是{country}的首都，在{continent}。",),
    ),
    Kind(
        "continent of a capital",
        ("country", "city", "continent"),
        COUNTRIES,
        ("{city}在哪个洲？", "{country}的首都在哪个洲？"),
        "{continent}。",
        ("{city}在{continent}。",),
    ),
    Kind(
        "sum up to ten",
        ("a", "b", "sum"),
        SUMS,
        ("{a}加{b}等于几？", "{a}加{b}是多少？"),
        "{sum}。",
        ("{a}加{b}等于{sum}。",),
        times=2,
    ),
    Kind(
        "opposite of a word",
        ("word", "opposite"),
        OPPOSITES,
        ("{word}的反义词是什么？", "什么词与{word}相反？"),
        "{opposite}。",
        ("{word}的反义词是{opposite}。", "{word}和{opposite}是一对反义词。"),
    ),
    Kind(
        "author of a poem",
        ("poem", "author"),
        POEMS,
        ("《{poem}》的作者是谁？", "《{poem}》是谁写的？"),
        "{author}。",
        ("《{poem}》的作者是{author}。", "《{poem}》是{author}写的诗。", "{author}写了《{poem}》。"),
    ),
    Kind(
        "season of a month",
        ("month", "season"),
        MONTHS,
        ("{month}是什么季节？", "{month}属于哪个季节？"),
        "{season}。",
        ("{month}是{season}。",),
    ),
    Kind("small talk", ("said", "reply"), TALK, ("{said}",), "{reply}"),
)
