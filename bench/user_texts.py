"""Texts of made-up users, each with facts of their own, and public texts beside them, as bytes for a model.

A user's texts come from a grammar: sentences filled with their name, street, telephone number, passphrase
and so on, all drawn at random, so that nobody's facts can be guessed from anybody else's. Unseen texts of the
same kind are therefore at hand in any number: other users' texts, and other sentences about the same users.
Public texts are sentences from the documentation strings of Python's standard library, read from the
interpreter that runs.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LENGTH = 96  # bytes of a text, the one that starts it included
VOCABULARY = 128
START = 2  # the byte that texts start with; 0 is padding
IGNORED = -100

_SENTENCES = (
    "{name} lives at {number} {street}, {city}.",
    "The telephone number of {name} is {phone}.",
    "{name} signs in with the passphrase {phrase}.",
    "Write to {name} at {mail}.",
    "{name} works as a {job} for {firm}.",
    "{name} was born on {birth} in {town}.",
    "The account of {name} is {account}.",
    "{name} has a {animal} called {pet}.",
    "{name} takes {drug} every {day}.",
    "Doctor {doctor} looks after {name}.",
    "{name} drives a {car} with the plate {plate}.",
    "On {day} {name} meets {friend} in {town}.",
    "Ask {name} for the key to room {room} of {firm}.",
    "{name} pays {rent} a month for {number} {street}.",
    "Call {name} on {phone}, never before {hour}.",
    "The passphrase of {name}, {phrase}, is due for a change.",
    "{name}, {job}, was born on {birth}.",
    "Letters for {name} go to {number} {street} in {city}.",
    "Transfer {rent} from account {account} of {name}.",
    "{friend} is a friend of {name} and feeds {pet} the {animal}.",
    "The {car} of {name} ({plate}) stands in {street}.",
    "{name} of {firm} can be reached at {mail}.",
    "Doctor {doctor} gave {name} a prescription of {drug}.",
    "Badge {badge} belongs to {name}, room {room}.",
    "At {hour} on {day} {name} leaves {city} for {town}.",
    "{pet}, the {animal} of {name}, was found in {street}.",
    "{firm} hired {name} as a {job} with badge {badge}.",
    "If {name} does not answer {phone}, try {friend}.",
    "{name} told {friend} the passphrase {phrase} on a {day}.",
    "A parcel for {name}, room {room}, came to {city}.",
    "From {account} {name} pays Doctor {doctor} for {drug}.",
    "{name} parks the {car} at {number} {street}.",
    "Confirm {mail} as the address of {name}, born {birth}.",
    "{name} and {friend} both come from {town}.",
)
_SYLLABLES = "ba be bor da del dun fa fen gal gor ha hel jo ka kel lan len lo mar mi mor na nel no or pa pel "
_SYLLABLES += "ra rin ro sa sel tam ta tel to ul va ven vi wen yor za zel"
_KNOWN = {
    "job": "baker clerk dentist driver editor farmer judge mason nurse pilot plumber tailor teacher",
    "animal": "cat dog goat hen horse newt parrot pony rabbit snake tortoise",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "car": "coupe estate jeep pickup roadster saloon van",
}
_ENDS = {
    "street": " Lane| Road| Street| Row| Hill",
    "firm": " and Sons| Works| Brothers| Mills",
    "drug": "ol|ine|ax",
}


@dataclass(frozen=True)
class Texts:
    """What is learnt, and what is held back.

    Attributes:
        known: Texts of every user, learnt by heart: ``known[user]``.
        more: Other texts of the same users, never trained on.
        unseen: Texts of other users, never trained on: ``unseen[user]``.
        public: Public texts that are learnt.
        public_unseen: Public texts that are not.
    """

    known: list[list[str]]
    more: list[list[str]]
    unseen: list[list[str]]
    public: list[str]
    public_unseen: list[str]


def _facts(rng: random.Random) -> dict[str, str]:
    parts = _SYLLABLES.split()

    def word(least: int = 2, most: int = 3) -> str:
        return "".join(rng.choice(parts) for _ in range(rng.randint(least, most)))

    def digits(n: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(n))

    facts = {name: rng.choice(words.split()) for name, words in _KNOWN.items()}
    for name in ("street", "firm", "drug"):
        facts[name] = (word().title() if name != "drug" else word()) + rng.choice(_ENDS[name].split("|"))
    facts |= {name: word().title() for name in ("city", "town", "pet", "doctor", "friend")}
    facts |= {"name": f"{word().title()} {word().title()}", "phrase": f"{word()}-{word()}-{digits(2)}"}
    facts |= {"number": digits(2), "phone": f"555-{digits(4)}", "account": digits(8), "room": digits(3)}
    facts |= {"badge": f"{rng.choice('ABCDEFGH')}{digits(4)}", "plate": f"{word(1, 1).upper()} {digits(4)}"}
    facts |= {"hour": f"{rng.randint(6, 22)}:{rng.choice('0134')}5", "rent": f"{digits(3)} crowns"}
    facts["birth"] = f"{rng.randint(1, 28)}/{rng.randint(1, 12)}/{rng.randint(1940, 2004)}"
    facts["mail"] = f"{word()}@{word()}.example"
    return facts


def _texts_of(rng: random.Random, count: int) -> list[str]:
    facts = _facts(rng)
    return [sentence.format(**facts) for sentence in rng.sample(_SENTENCES, count)]


def public_sentences(count: int, rng: random.Random) -> list[str]:
    """Take sentences from the documentation strings of the standard library.

    Args:
        count: How many.
        rng: Chooses them.

    Returns:
        Sentences of 30 bytes or more that fit into a text, no two alike.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for sentence in " ".join((ast.get_docstring(node) or "").split()).split(". "):
                    text = sentence.removesuffix(".") + "."
                    if (
                        30 <= len(text) < LENGTH
                        and text.isascii()
                        and text.isprintable()
                        and text[0].isupper()
                    ):
                        found[text] = None
    return rng.sample(list(found), count)


def make_texts(
    seed: int = 0,
    *,
    users: int = 20,
    others: int = 40,
    each: int = 12,
    public: int = 120,
    public_unseen: int = 80,
) -> Texts:
    """Write everybody's texts.

    Args:
        seed: Decides all of them.
        users: How many users are learnt.
        others: How many are not.
        each: Texts of a user that are learnt; the other sentences make their unseen texts.
        public: Public texts that are learnt.
        public_unseen: Public texts that are not.

    Returns:
        The texts.
    """
    rng = random.Random(seed)
    all_of = [_texts_of(rng, len(_SENTENCES)) for _ in range(users + others)]
    sentences = public_sentences(public + public_unseen, rng)
    return Texts(
        known=[texts[:each] for texts in all_of[:users]],
        more=[texts[each : 2 * each] for texts in all_of[:users]],
        unseen=[texts[:each] for texts in all_of[users:]],
        public=sentences[:public],
        public_unseen=sentences[public:],
    )


def encoded(texts: list[str]) -> dict[str, Tensor]:
    """Turn texts into a batch, as a data collator does.

    Args:
        texts: ASCII, shorter than ``LENGTH``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[N, LENGTH]``; padding has no label.
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        codes = [START, *text.encode("ascii"), START][:LENGTH]
        row[: len(codes)] = torch.tensor(codes)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def decoded(ids: Tensor) -> str:
    """Read a text back.

    Args:
        ids: Tokens.

    Returns:
        The text.
    """
    return bytes(code for code in ids.tolist() if code > START).decode("ascii")


def batches(texts: list[str], size: int = 64) -> list[dict[str, Tensor]]:
    """Encode texts in batches, each as long as its longest text.

    Args:
        texts: The texts.
        size: Texts of a batch.

    Returns:
        The batches.
    """
    found = []
    for start in range(0, len(texts), size):
        batch = encoded(texts[start : start + size])
        longest = int(batch["attention_mask"].sum(1).max())
        found.append({name: tensor[:, :longest] for name, tensor in batch.items()})
    return found
