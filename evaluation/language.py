"""Which language a text is written in, as far as its script tells."""

import re

# Chinese characters: CJK unified ideographs with extension A, compatibility ideographs, and the further planes.
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def language_of(text: str) -> str:
    """"zh" for a text with a Chinese character, else "en"; other languages are not told apart."""
    return "zh" if CHINESE.search(text) else "en"
