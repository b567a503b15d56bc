"""Other anchors for a corpus function, made by rule: what people type into a search box is rarely a summary.

`question` is the summary asked back, `later` a later sentence of the docstring; a row has those that the
rules find. Words of the function's name, which are in its code as well, were tried as a third kind and took
0.02 off the dev MRR@10 (96 steps of 32, one run each).
"""

from __future__ import annotations

import re

from common.corpus import normalise

# First words of a summary that is a command; others ("The ...", "Helper ...", "If ...") make no question.
VERBS = frozenset(re.findall(r"\w+", """
    accept add adjust allow append apply approximate assert assign attach bind broadcast build cache calculate
    call cancel cast change check choose clear clip close coerce combine compare compile compress compute
    concatenate configure connect construct convert copy count create decode decompose delete derive detect
    determine differentiate display divide download draw drop emit encode ensure enumerate escape estimate
    evaluate execute expand extract fetch fill filter find fit flatten flush format generate get give group
    guess handle import infer initialize insert install integrate interpolate invert iterate join list load
    lock log look make mark match measure merge minimize move multiply normalize open override pack pad parse
    perform permute pick plot pop predict print process produce project put query raise read rebuild receive
    record reduce refine register remove rename render reorder repeat replace represent reset reshape resolve
    retrieve return reverse rewrite rotate round run sample save scale search select send serialize set shift
    show shuffle shutdown simplify skip solve sort split start stop store strip subtract sum swap take test
    transform translate transpose truncate try turn unify unpack update use validate verify wait wrap write
    yield"""))
# Words that open a section or a remark instead of saying what the function does.
REMARKS = re.compile(r"(see|notes?|new in|changed|deprecated|added|references?|examples?|parameters|returns?|"
                     r"raises|args|arguments|warnings?|for (more|details|example)|e\.g|i\.e|this is)\b", re.I)

TRUTH = re.compile(r"(?:true|1) (?:if and only if|iff?|when) (.+?)"
                   r"(?:[,;]? (?:and |or )?(?:false|else|otherwise)\b.*)?$", re.I)


def alternatives(name: str, summary: str, docstring: str) -> dict[str, str]:
    """{"question", "later"}, those there are, of the function `name` (module.qualname)."""
    found = {"question": question(summary), "later": later(name, docstring)}
    return {kind: text for kind, text in found.items() if text}


def question(summary: str) -> str | None:
    """Compute the shortest path. -> how to compute the shortest path; None if no verb of VERBS comes first.

    Returning is called checking where the answer is a truth value, and getting elsewhere.
    """
    first, *rest = sentences(summary)[0].rstrip(".:;").split()
    verb = next((form for form in base_forms(first.lower()) if form in VERBS), None)
    said = " ".join(rest)
    if verb is None or not 2 <= len(rest) <= 24:
        return None
    if verb == "return":
        truth = TRUTH.match(said)
        verb = "check" if truth or said.startswith("whether ") else "get"
        said = f"if {truth[1]}" if truth else said
    return f"how to {verb} {said}"


def base_forms(verb: str) -> list[str]:
    """What a verb may be without the third person's -s: applies -> apply, uses -> use, matches -> match."""
    return [verb, re.sub("ies$", "y", verb), verb.removesuffix("s"), verb.removesuffix("es")]


def later(name: str, docstring: str) -> str | None:
    """The first whole sentence of 4 to 20 words after a docstring's first paragraph that does not say the
    function's name.

    Only prose counts: not what follows the first heading, and no paragraph that is indented or has code,
    fields or lists.
    """
    own = re.compile(rf"\b{re.escape(name.rsplit('.', 1)[-1])}\b", re.I)
    for paragraph in re.split(r"\n\s*\n", docstring.strip())[1:]:
        if re.search(r"^\s*([-=~^]{3,}\s*$|\w+:\s*$)", paragraph, re.M):  # a heading
            return None
        if re.match(r"\s", paragraph) or re.search(r">>>|::|^\s*([-*+:@|]|\.\.|\d+[.)])", paragraph, re.M):
            continue
        for text in sentences(paragraph):
            ends = text[0].isupper() and text.endswith(".") and text.isascii()
            if ends and 4 <= len(text.split()) <= 20 and not own.search(text) and not REMARKS.match(text):
                return text
    return None


def sentences(text: str) -> list[str]:
    """Sentences of a paragraph without the markup of reStructuredText."""
    plain = re.sub(r":[\w:]+:`~?([^`<]*?)(?: <[^`]*>)?`", r"\1", text)
    plain = re.sub(r"(?<!\w)\*+(\w+)\*+(?!\w)", r"\1", plain.replace("`", ""))
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(plain.split()))


def allowed(row: dict, taken: set[str]) -> dict[str, str]:
    """The row's "anchors" that are none of `taken` (normalised texts) and do not stand in its positive."""
    positive = normalise(row["positive"])
    return {kind: text for kind, text in row["anchors"].items()
            if normalise(text) not in taken and normalise(text) not in positive}
