# ruff: noqa: E501, SIM905
"""Sentences and tokens of English text by rules, without a model: those of spaCy's blank English pipeline (3.8).

Published systems cut pages and reports with spaCy's tokenizer and `sentencizer`. Both are a few tables and one loop, so
they are written out here instead of asking for a package of 100 MB. Latin, Cyrillic and Greek text is cut as spaCy
cuts it; for other scripts letters are those of Unicode, which differ from spaCy's in rare cases.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from itertools import product

_LONGEST_ADDRESS = 2048  # characters; the pattern of addresses takes quadratic time


def sentences(text: str) -> list[tuple[str, int]]:
    """The sentences of a text with their numbers of tokens.

    A sentence ends behind its punctuation; blanks between sentences belong to none, further ones begin the next.
    """
    found: list[tuple[str, int]] = []
    begin = end = count = 0
    ended = False
    for start, stop in _spans(text):
        token = text[start:stop]
        ends = token in _ENDS
        if ended and not ends and not _is_punctuation(token):
            found.append((text[begin:end], count))
            begin, count, ended = start, 0, False
        ended = ended or ends
        end, count = stop, count + 1
    return [*found, (text[begin:end], count)] if count else found


def tokens(text: str) -> list[str]:
    """The tokens of a text; runs of more than one blank are tokens too."""
    return [text[start:stop] for start, stop in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of every token."""
    spans: list[tuple[int, int]] = []
    for chunk in re.finditer(r"\s+|\S+", text):
        begin, piece = chunk.start(), chunk[0]
        if piece[0].isspace():
            # one blank belongs to the word in front of it
            skipped = int(begin > 0 and piece[0] == " ")
            if len(piece) > skipped:
                spans.append((begin + skipped, chunk.end()))
            continue
        for token in _split(piece):
            spans.append((begin, begin + len(token)))
            begin += len(token)
    return _merge_specials(text, spans)


@functools.lru_cache(maxsize=1 << 16)
def _split(chunk: str) -> tuple[str, ...]:
    """The tokens of a text without blanks."""
    if chunk in _SPECIALS:
        return _SPECIALS[chunk]
    return tuple(_split_affixes(chunk, _SPECIALS))


def _split_affixes(chunk: str, specials: dict[str, tuple[str, ...]]) -> list[str]:
    """Prefixes and suffixes taken off in turn, and what is between them cut at its infixes."""
    prefixes: list[str] = []
    suffixes: list[str] = []
    last = 0
    while chunk and len(chunk) != last and chunk not in specials:
        last = len(chunk)
        found = _PREFIX.search(chunk)
        before = found.end() if found else 0
        if before and chunk[before:] in specials:
            prefixes.append(chunk[:before])
            chunk = chunk[before:]
            break
        found = _SUFFIX.search(chunk[before:])
        after = found.end() - found.start() if found else 0
        if after and chunk[:-after] in specials:
            suffixes.append(chunk[-after:])
            chunk = chunk[:-after]
            break
        if before and after and before + after <= len(chunk):
            prefixes.append(chunk[:before])
            suffixes.append(chunk[-after:])
            chunk = chunk[before:-after]
        elif before:
            prefixes.append(chunk[:before])
            chunk = chunk[before:]
        elif after:
            suffixes.append(chunk[-after:])
            chunk = chunk[:-after]
    return prefixes + _middle(chunk, specials) + suffixes[::-1]


def _middle(chunk: str, specials: dict[str, tuple[str, ...]]) -> list[str]:
    if not chunk:
        return []
    if chunk in specials:
        return list(specials[chunk])
    if len(chunk) <= _LONGEST_ADDRESS and _ADDRESS.match(chunk):
        return [chunk]
    pieces: list[str] = []
    start = 0
    for found in _INFIX.finditer(chunk):
        if not found.start():
            continue
        if found.start() != start:
            pieces.append(chunk[start : found.start()])
        pieces.append(found[0])
        start = found.end()
    return [*pieces, chunk[start:]] if start < len(chunk) else pieces


def _merge_specials(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Special cases that hold affixes, put together where they were cut; the longest first, then the last."""
    matches: list[tuple[int, int]] = []
    for start, (begin, end) in enumerate(spans):
        for pieces in _CUT_SPECIALS.get(text[begin:end], ()):
            there = spans[start : start + len(pieces)]
            if len(there) == len(pieces) and all(text[a:b] == one for (a, b), one in zip(there, pieces, strict=True)):
                matches.append((start, start + len(pieces)))
    if not matches:
        return spans
    taken: set[int] = set()
    chosen: dict[int, tuple[int, tuple[str, ...]]] = {}
    for start, stop in sorted(matches, key=lambda match: (match[1] - match[0], -match[0]), reverse=True):
        special = text[spans[start][0] : spans[stop - 1][1]]
        # blanks between the pieces are seen last, as in spaCy: they do not make room for a shorter match
        if start not in taken and stop - 1 not in taken and special in _SPECIALS:
            chosen[start] = stop, _SPECIALS[special]
        taken.update(range(start, stop))
    merged: list[tuple[int, int]] = []
    number = 0
    while number < len(spans):
        if number not in chosen:
            merged.append(spans[number])
            number += 1
            continue
        begin = spans[number][0]
        number, pieces = chosen[number]
        for piece in pieces:
            merged.append((begin, begin + len(piece)))
            begin += len(piece)
    return merged


@functools.lru_cache(maxsize=4096)
def _is_punctuation(token: str) -> bool:
    return all(unicodedata.category(character).startswith("P") for character in token)


def _letters(*categories: str, alphabets: str = "") -> str:
    """A character class of the letters of Latin blocks in these categories, and of the alphabets."""
    blocks = ((0x41, 0x250), (0x1E00, 0x1F00), (0x2C60, 0x2C80), (0xA722, 0xA7BA), (0xFF21, 0xFF5B), (0xAB30, 0xAB65))
    found = [
        chr(code) for low, high in blocks for code in range(low, high) if unicodedata.category(chr(code)) in categories
    ]
    return _ranges([ord(one) for one in found if one not in "ªº"] + [ord(one) for one in alphabets])


def _ranges(codes: list[int]) -> str:
    codes = sorted(set(codes))
    out, begin = [], None
    for number, code in enumerate(codes):
        begin = code if begin is None else begin
        if number + 1 == len(codes) or codes[number + 1] != code + 1:
            out.append(f"\\U{begin:08x}-\\U{code:08x}")
            begin = None
    return "".join(out)


_CYRILLIC = "ёабвгдежзийклмнопрстуфхцчшщъыьэюяәөүҗңһіїєґѓѕјљњќѐѝ"
_GREEK = "αβγδεζηθικλμνξοπρςστυφχψωάέίόώήύ"
_UNCASED = (
    r"\u1200-\u137F\u0980-\u09FF\u0591-\u05F4\uFB1D-\uFB4F\u0620-\u064A\u066E-\u06D5\u06E5-\u06FF\u0750-\u077F"
    r"\u08A0-\u08BD\uFB50-\uFBB1\uFBD3-\uFD3D\uFD50-\uFDC7\uFDF0-\uFDFB\uFE70-\uFEFC\U0001EE00-\U0001EEBB"
    r"\u0D80-\u0DFF\u0900-\u097F\u0C80-\u0CFF\u0B80-\u0BFF\u0C00-\u0C7F\uAC00-\uD7AF\u1100-\u11FF\u3040-\u309F"
    r"\u30A0-\u30FF\u4E00-\u9FFF\u3400-\u4DBF\U00020000-\U0002A6DF\U0002A700-\U0002EBEF\u2E80-\u2FDF\u2FF0-\u303F"
    r"\u31C0-\u31EF\u3200-\u33FF\uF900-\uFAFF\uFE30-\uFE4F\U0001F200-\U0001F2FF\U0002F800-\U0002FA1F"
)
_LOWER = (
    _letters("Ll", alphabets=_CYRILLIC + _GREEK) + r"\u0250-\u02AF\u1D00-\u1D25\u1D6B-\u1D77\u1D79-\u1D9A" + _UNCASED
)
_UPPER = _letters("Lu", alphabets=(_CYRILLIC + _GREEK).upper()) + _UNCASED
_ALPHA = _LOWER + _letters("Lu", "Lo", "Lt", "Lm", alphabets=(_CYRILLIC + _GREEK).upper())
_ICONS = _ranges([code for code in range(0xA0, 0x1FA70) if unicodedata.category(chr(code)) == "So"])
_UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa "
    "mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч "
    "кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ тбكم كم² كم³ م م² م³ سم سم² سم³ مم مم² مم³ كم غرام جرام جم كغ ملغ "
    "كوب اكواب"
).split()
_CURRENCY = r"\$ £ € ¥ ฿ US\$ C\$ A\$ ₽ ﷼ ₴ ₠ ₡ ₢ ₣ ₤ ₥ ₦ ₧ ₨ ₩ ₪ ₫ ₭ ₮ ₯ ₰ ₱ ₲ ₳ ₵ ₶ ₷ ₸ ₹ ₺ ₻ ₼ ₾ ₿".split()
_PUNCTUATION = r"… …… , : ; \! \? ¿ ؟ ¡ \( \) \[ \] \{ \} < > _ # \* & 。 ？ ！ ， 、 ； ： ～ · । ، ۔ ؛ ٪".split()
_QUOTES = r'\' " ” “ ` ‘ ´ ’ ‚ , „ » « 「 」 『 』 （ ） 〔 〕 【 】 《 》 〈 〉 〈 〉 ⟦ ⟧'.split()
_QUOTE_CLASS = "".join(_QUOTES)
_ELLIPSES = [r"\.\.+", "…"]

_PREFIX = re.compile(
    "|".join(
        "^" + part
        for part in (
            *("§", "%", "=", "—", "–", r"\+(?![0-9])"),
            *(*_PUNCTUATION, *_ELLIPSES, *_QUOTES, *_CURRENCY, f"[{_ICONS}]"),
        )
    )
)
_SUFFIX = re.compile(
    "|".join(
        part + "$"
        for part in (
            *(*_PUNCTUATION, *_ELLIPSES, *_QUOTES, f"[{_ICONS}]"),
            *("'s", "'S", "’s", "’S", "—", "–", r"(?<=[0-9])\+", r"(?<=°[FfCcKk])\."),
            f"(?<=[0-9])(?:{'|'.join(_CURRENCY)})",
            f"(?<=[0-9])(?:{'|'.join(_UNITS)})",
            # the class holds the characters of a group that was meant, as spaCy's does
            rf"(?<=[0-9{_LOWER}%²\-\+{'|'.join(_PUNCTUATION)}(?:{_QUOTE_CLASS})])\.",
            rf"(?<=[{_UPPER}][{_UPPER}])\.",
        )
    )
)
_INFIX = re.compile(
    "|".join(
        (
            *(*_ELLIPSES, f"[{_ICONS}]", r"(?<=[0-9])[+\-\*^](?=[0-9-])"),
            rf"(?<=[{_LOWER}{_QUOTE_CLASS}])\.(?=[{_UPPER}{_QUOTE_CLASS}])",
            f"(?<=[{_ALPHA}]),(?=[{_ALPHA}])",
            f"(?<=[{_ALPHA}0-9])(?:-|–|—|--|---|——|~)(?=[{_ALPHA}])",
            f"(?<=[{_ALPHA}0-9])[:<>=/](?=[{_ALPHA}])",
        )
    )
)
# Diego Perini's pattern of addresses (https://gist.github.com/dperini/729294, MIT) as spaCy changed it
_ADDRESS = re.compile(
    r"^(?:(?:[\w\+\-\.]{2,})://)?(?:\S+(?::\S*)?@)?(?:(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)"
    r"(?:\.\d{1,3}){2})(?!172\.(?:1[6-9]|2\d|3[0-1])(?:\.\d{1,3}){2})(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])"
    r"(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}(?:\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4]))|"
    r"(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?[A-Za-z0-9\u00a1-\uffff]\.)+"
    rf"(?:[{_LOWER}]{{2,63}}))(?::\d{{2,5}})?(?:[/?#]\S*)?$"
)
_ENDS = frozenset(
    "! . ? ։ ؟ ۔ ܀ ܁ ܂ ߹ । ॥ ၊ ။ ። ፧ ፨ ᙮ ᜵ ᜶ ᠃ ᠉ ᥄ ᥅ ᪨ ᪩ ᪪ ᪫ ᭚ ᭛ ᭞ ᭟ ᰻ ᰼ ᱾ ᱿ ‼ ‽ ⁇ ⁈ ⁉ ⸮ ⸼ ꓿ ꘎ ꘏ ꛳ ꛷ ꡶ ꡷ ꣎ ꣏ ꤯ ꧈ ꧉ ꩝ ꩞ ꩟ "
    "꫰ ꫱ ꯫ ﹒ ﹖ ﹗ ！ ． ？ 𐩖 𐩗 𑁇 𑁈 𑂾 𑂿 𑃀 𑃁 𑅁 𑅂 𑅃 𑇅 𑇆 𑇍 𑇞 𑇟 𑈸 𑈹 𑈻 𑈼 𑊩 𑑋 𑑌 𑗂 𑗃 𑗉 𑗊 𑗋 𑗌 𑗍 𑗎 𑗏 𑗐 𑗑 𑗒 𑗓 𑗔 𑗕 𑗖 𑗗 𑙁 𑙂 𑜼 𑜽 "
    "𑜾 𑩂 𑩃 𑪛 𑪜 𑱁 𑱂 𖩮 𖩯 𖫵 𖬷 𖬸 𖭄 𛲟 𝪈 ｡ 。".split()
)


def _special_cases() -> dict[str, tuple[str, ...]]:
    """Words that rules would cut otherwise, with their tokens."""
    whole = (
        r"""\t \n — ' \") <space> '' C++ ä. ö. ü. 'd a.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. """
        r"""i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. p.m. Ph.D. Prof. Rep. Rev. Sen. St. vs. """
        r"""v.s. 'S 's ‘S ‘s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am o'clock """
        r"""O'clock Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. """
        r"""Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. """
        r"""Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. em 'em ll 'll nuff 'nuff """
        r""":) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( """
        r""":(( :-(( :((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o """
        r""":0 :-0 :() >:o :* :-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ """
        r""">.< >.> <.< ._. ;_; -_- -__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ """
        r"""<3 <33 <333 </3 (^_^) (-_-) (._.) (>_<) (*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*>"""
    ).split()
    found = {word: (word,) for word in [*whole, *(f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyz")]}
    found |= {f"°{unit}.": ("°", unit, ".") for unit in "cfkCFK"}
    words = "doin goin nothin nuthin ol somethin lovin havin"
    found |= {form: (form,) for word in words.split() for form in _both(word) + [f"{one}'" for one in _both(word)]}

    def contract(words: str, *endings: str) -> None:
        for word, ending in product(words.split(), endings):
            for form in _both(word):
                pieces = ending.split("|")
                found[form + "".join(pieces)] = (form, *pieces)
                bare = [piece.replace("'", "") for piece in pieces]
                found[form + "".join(bare)] = (form, *bare)

    contract("i", "'m", "'m|a")
    contract("i you he she it we they", "'ll", "'ll|'ve", "'d", "'d|'ve")
    contract("i you we they", "'ve")
    contract("you we they", "'re")
    contract("he she it", "'s")
    asking = "who what when where why how there"
    contract(f"{asking} that this", "'s")
    contract(f"{asking} that this these those", "'ll", "'ll|'ve", "'d", "'d|'ve")
    contract(f"{asking} these those", "'re", "'ve")
    verbs = "ca could do does did had may might must need ought sha should wo would"
    contract(verbs, "n't", "n't|'ve")
    contract("could might must should would", "'ve")
    contract("ai are is was were have has dare", "n't")
    for hour, period in product(range(1, 13), ("a.m.", "am", "p.m.", "pm")):
        found[f"{hour}{period}"] = (str(hour), period)
    others = (
        "y'|all y|all how|'d|'y How|'d|'y not|'ve not|ve Not|'ve Not|ve can|not Can|not gon|na Gon|na got|ta Got|ta "
        "let|'s Let|'s c'm|on C'm|on"
    )
    found |= {other.replace("|", ""): tuple(other.split("|")) for other in others.split()}
    for word in "Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore".split():
        found.pop(word, None)
    curly = {
        key.replace("'", "’"): tuple(piece.replace("'", "’") for piece in found[key]) for key in found if "'" in key
    }
    return curly | found


def _both(word: str) -> list[str]:
    return [word, word.title()]


_SPECIALS = _special_cases()


def _cut_specials() -> dict[str, list[tuple[str, ...]]]:
    """The pieces of special cases that rules cut, by the first of them."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for special in _SPECIALS:
        if _PREFIX.search(special) or _SUFFIX.search(special) or _INFIX.search(special):
            pieces = tuple(_split_affixes(special, {}))
            found.setdefault(pieces[0], []).append(pieces)
    return found


_CUT_SPECIALS = _cut_specials()
