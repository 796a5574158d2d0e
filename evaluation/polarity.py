"""Whether an answer says yes or no, in English or Chinese."""

import re

_LETTER = "[^\\W\u4e00-\u9fff]"  # of a word that is written with spaces around, unlike Chinese ones
_POLARITY = re.compile(
    f"""
    (?P<aside>对不起|對不起|不好意思|不过|不過|不仅|不僅|不但|不光|是否(?!定)|是不是|有没有|有沒有|对不对|對不對
        |否则|否則|所有|但是|可是|还是|還是)
    |(?P<yes>(?<!{_LETTER})(?:yes|yeah|yep)(?!{_LETTER})
        |没错|沒錯|不错|不錯|是的|(?<!\\w)(?:[是有](?![没沒不否无無]|no)|[对對](?![^的啊呀了\\W])))
    |(?P<no>(?<!{_LETTER})(?:no|not|nope|none|cannot)(?!{_LETTER})|n['’]t(?!{_LETTER})|[不没沒否无無])
    |(?P<perhaps>[是有]|[对對](?!\\w))
    """,
    re.IGNORECASE | re.VERBOSE,
)


def polarity(text: str) -> bool | None:
    """Whether the first word that affirms or denies, in English or Chinese, affirms; None where there is none.

    "不是", "没有", "否" deny, for a denial begins with its negation. "是", "有", "对" affirm at the beginning of a
    clause ("有，两只"); elsewhere they are parts of a sentence ("图中有狗", "答案是没有") and affirm if no word denies.
    """
    kinds = [found.lastgroup for found in _POLARITY.finditer(text)]
    sure = next((kind for kind in kinds if kind in ("yes", "no")), None)
    return sure == "yes" if sure else True if "perhaps" in kinds else None
