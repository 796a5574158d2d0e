"""What the interface in the browser says, in English and Chinese."""

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    "en": {
        "chat": "Conversation",
        "hello": "Drop, paste or upload pictures or a clip, and ask about them.",
        "box": "Question",
        "ask": "Ask about the pictures ...",
        "stop": "Stop",
        "regenerate": "Regenerate",
        "undo": "Undo",
        "clear": "Clear",
        "stopped": "[stopped]",
        "no_answer": "[no words]",
        "look": "Where did it look?",
        "look_hint": "Occlusion hides one place after the other and measures how much less likely the answer becomes. "
        "Attention is quick, but an answer need not depend on what gets most of it.",
        "method": "Method",
        "occlusion": "Occlusion",
        "features": "Occlusion of features",
        "attention": "Attention, mean of layers",
        "rollout": "Attention rollout",
        "map": "Map",
        "map_of": "Map of the answer: {answer}",
        "signed": "Orange: without this place the answer becomes less likely. Violet: more likely.",
        "shares": "Yellow: much attention. Blue: little.",
        "left": "With the strongest place hidden, {left:.1%} of the answer's probability is left.",
        "changes": "Hiding some place changes the answer.",
        "stays": "No single place changes the answer.",
        "largest_share": "The strongest place gets {share:.1%} of all attention.",
        "frame": "{name}, frame {frame}",
        "looking": "Looking ...",
        "examples": "Examples",
        "settings": "Settings",
        "system": "System prompt",
        "system_hint": "Empty: none.",
        "max_new_tokens": "Longest answer, in tokens",
        "num_beams": "Beams",
        "num_beams_hint": "Above 1 the answer appears when it is complete.",
        "repetition_penalty": "Repetition penalty",
        "do_sample": "Draw tokens (off: the likeliest one each time)",
        "temperature": "Temperature",
        "top_p": "Top-p",
        "top_k": "Top-k (0: all)",
        "seed": "Seed (empty: another answer each time)",
        "no_question": "Write a question, too.",
        "nothing_asked": "Nothing was asked yet.",
        "no_picture": "The conversation shows no picture to look at.",
        "answering": "The last answer is not finished. Stop it first.",
        "out_of_range": "{name}: {range}, not {value}.",
        "many_files": "{count} files with one question; at most {most} are taken.",
        "long_clip": "{name} is longer than {most:g} seconds. Send a shorter clip.",
        "many_pixels": "{name} has more than {most:g} million pixels. Send a smaller one.",
        "empty_file": "{name} is empty.",
        "no_file": "{name} is no longer on the server. Send it again.",
        "no_image": "{name} is not an image in a format that is read. Send it as JPEG or PNG.",
        "bad_image": "{name} can't be decoded; it may be damaged or cut off.",
        "bad_clip": "{name} holds no video that can be decoded. Send it as MP4 or WebM.",
        "long_text": "A text has {count} characters; at most {most} are taken.",
        "long_prompt": "The conversation has {tokens} tokens with its pictures; at most {most} are taken. "
        "Ask a shorter question, send fewer pictures, or clear the conversation.",
        "forgotten": "The server no longer has the earlier conversation. A question begins a new one.",
        "failed": "That did not work: {error}",
    },
    "zh": {
        "chat": "对话",
        "hello": "拖入、粘贴或上传图片或视频，然后提问。",
        "box": "问题",
        "ask": "就图片提问……",
        "stop": "停止",
        "regenerate": "重新回答",
        "undo": "撤销",
        "clear": "清空",
        "stopped": "[已停止]",
        "no_answer": "[没有文字]",
        "look": "模型看了哪里？",
        "look_hint": "遮挡法依次盖住图中各处，测量回答的概率下降多少。注意力计算很快，"
        "但得到最多注意力的地方不一定是回答的依据。",
        "method": "方法",
        "occlusion": "遮挡",
        "features": "遮挡特征",
        "attention": "注意力（各层平均）",
        "rollout": "注意力展开（rollout）",
        "map": "热图",
        "map_of": "回答的热图：{answer}",
        "signed": "橙色：盖住此处，回答的概率下降；紫色：上升。",
        "shares": "黄色：注意力多；蓝色：注意力少。",
        "left": "盖住影响最大之处，回答的概率只剩原来的 {left:.1%}。",
        "changes": "盖住某一处会改变回答。",
        "stays": "盖住任何一处都不会改变回答。",
        "largest_share": "注意力最多之处占全部注意力的 {share:.1%}。",
        "frame": "{name}，第 {frame} 帧",
        "looking": "正在计算……",
        "examples": "示例",
        "settings": "设置",
        "system": "系统提示词",
        "system_hint": "留空表示没有。",
        "max_new_tokens": "回答最多的 token 数",
        "num_beams": "束宽（beams）",
        "num_beams_hint": "大于 1 时，回答在完成后才一次显示。",
        "repetition_penalty": "重复惩罚",
        "do_sample": "随机采样（关闭时每次取最可能的 token）",
        "temperature": "温度",
        "top_p": "Top-p",
        "top_k": "Top-k（0 表示全部）",
        "seed": "随机种子（留空则每次不同）",
        "no_question": "请同时写一个问题。",
        "nothing_asked": "还没有提问。",
        "no_picture": "对话中没有图片，无处可看。",
        "answering": "上一个回答还没有结束，请先停止。",
        "out_of_range": "{name}：{range}，而不是 {value}。",
        "many_files": "一个问题带了 {count} 个文件，最多 {most} 个。",
        "long_clip": "{name} 超过 {most:g} 秒，请用更短的视频。",
        "many_pixels": "{name} 超过 {most:g} 百万像素，请用更小的图片。",
        "empty_file": "{name} 是空文件。",
        "no_file": "{name} 已不在服务器上，请重新上传。",
        "no_image": "{name} 不是可读格式的图片，请转成 JPEG 或 PNG。",
        "bad_image": "{name} 无法解码，可能已损坏或不完整。",
        "bad_clip": "{name} 中没有可以解码的视频，请转成 MP4 或 WebM。",
        "long_text": "文字有 {count} 个字符，最多 {most} 个。",
        "long_prompt": "对话连同图片有 {tokens} 个 token，最多 {most} 个。请缩短问题、减少图片，或清空对话。",
        "forgotten": "服务器上已没有先前的对话。提问将开始新的对话。",
        "failed": "没有成功：{error}",
    },
}

# `range` of `chat.sampling.SETTINGS` in the other languages.
RANGES = {
    "zh": {
        "a whole number from 1 on": "应为不小于 1 的整数",
        "a whole number from 0 on": "应为不小于 0 的整数",
        "a number from 0.01 to 100": "应为 0.01 到 100 之间的数",
        "a number above 0, at most 1": "应为大于 0、不大于 1 的数",
        "on or off": "应为开或关",
        "a whole number from 0 to 4294967295": "应为 0 到 4294967295 之间的整数",
    }
}


class Problem(ValueError):
    """What a user can mend: a key of `TEXTS`, and what the text names."""

    def __init__(self, key: str, **values):
        super().__init__(TEXTS["en"][key].format(**values))
        self.key, self.values = key, values

    def text(self, language: str) -> str:
        return TEXTS[language][self.key].format(**self.values)


def preferred(accept_language: str) -> str:
    """The key of `TEXTS` that a browser asks for first, by its Accept-Language header; English without any of them.

    Browsers list languages from the most wanted on, so the weights (`;q=0.8`) need not be read.
    """
    wanted = [part.split(";")[0].strip().split("-")[0].lower() for part in accept_language.split(",")]
    return next((language for language in wanted if language in TEXTS), "en")
