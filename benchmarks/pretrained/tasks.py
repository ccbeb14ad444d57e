"""Text tasks that are generated: facts hidden in prose, asked for at the end.

Everything is drawn from word lists with a seed, so that no sample can have been seen in training, and no two samples
share their facts. The answer's first words are given, as a user's form or a tool call would give them: what is left to
say is what has to be looked up.

    codes      one of four four-digit codes: the answer looks back once for every digit (many looks)
    list       what somebody buys, one thing after another (many looks)
    opening    the name that the first sentence gives, among other names (one look)
    instruction  the word that the first sentence says the answer shall end with (one look)
"""

import dataclasses
import random
from collections.abc import Callable


def _parts(text: str, separator: str = "|") -> list[str]:
    return text.split(separator)


FACTS = 4
MAX_NEW_TOKENS = 16
"""Room for any task's answer, and for some of what a model says behind it: one size, so that tasks share programs."""

NAMES = _parts(
    "Anna Boris Clara David Emma Felix Grace Henry Ida Jonas Karin Leo Maria Nils Olga Peter Rosa Simon Thea Viktor",
    " ",
)
THINGS = _parts(
    "violin lamp kettle ladder carpet basket hammer mirror blanket trumpet candle bucket saddle telescope umbrella "
    "typewriter globe anchor drum compass",
    " ",
)
PLACES = _parts(
    "kitchen garden attic barn cellar library chapel garage office stable tower workshop bakery school harbour museum "
    "theatre market forest station",
    " ",
)
GOODS = _parts(
    "apples bread candles butter rope salt honey paper nails cheese onions soap wool tea flour pepper rice vinegar "
    "matches plums",
    " ",
)
WORDS = _parts(
    "amber breeze copper dawn ember frost granite harvest ivory jasmine lantern marble nectar opal pearl quartz", " "
)

_WHO = _parts(
    "the miller|an old sailor|the teacher|a young painter|the postman|two farmers|the baker|a quiet traveller|"
    "the mayor|a group of children|the doctor|the shepherd|a tall stranger|the gardener|the clockmaker|a fisherman"
)
_DID = _parts(
    "walked along the river|counted the boats|talked about the weather|looked at the mountains|waited for the rain|"
    "told a long story|sang an old song|mended a broken fence|read a letter twice|drank a cup of coffee|"
    "climbed the hill|slept under a tree|painted the door|fed the birds|crossed the bridge|wrote in a notebook"
)
_WHEN = _parts(
    "In the morning|Before noon|Late in the evening|On Sunday|After the storm|During the winter|A week later|"
    "At sunrise|Long ago|In early spring|Once a year|That night"
)
_AND = _parts("and then|but soon|while others|and later|until somebody")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
      text: what the user says.
      begun: how the answer begins, which is given.
      answer: what must follow.
    """

    text: str
    begun: str
    answer: str

    @property
    def prompt(self) -> str:
        """The whole prompt as the decoder's chat template writes it, with the answer's first words."""
        return (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{self.text}<|im_end|>\n<|im_start|>assistant\n{self.begun}"
        )

    @property
    def split(self) -> tuple[str, str]:
        """The prompt up to the question, and from there on."""
        before, gap, question = self.prompt.rpartition("\n\n")
        return before + gap, question

    def right(self, said: str) -> bool:
        """Whether what was said is the answer, apart from what follows it and from case."""
        said = said.strip().lower()
        return said.startswith(self.answer.lower()) and not said[len(self.answer) :][:1].isalnum()


def _sentence(draw: random.Random) -> str:
    """About 18 tokens of prose without any fact."""
    first, second = draw.sample(_DID, 2)
    who = draw.choice(_WHO)
    return f"{draw.choice(_WHEN)} {who} {first}, {draw.choice(_AND)} {second}."


def _hidden(draw: random.Random, facts: list[str], sentences: int) -> str:
    """The facts in their order at random places of the prose, none at its very end."""
    prose = [_sentence(draw) for _ in range(sentences)]
    for place, fact in sorted(zip(draw.sample(range(sentences), len(facts)), facts, strict=True), reverse=True):
        prose.insert(place, fact)
    return " ".join(prose)


def codes(draw: random.Random, sentences: int) -> Sample:
    """See above."""
    names = draw.sample(NAMES, FACTS)
    numbers = [f"{n}" for n in draw.sample(range(1000, 10000), FACTS)]
    text = _hidden(draw, [f"The code of {a} is {b}." for a, b in zip(names, numbers, strict=True)], sentences)
    asked = draw.randrange(FACTS)
    question = draw.choice(["What is the code of {}?", "Which code does {} have?", "Tell me the code of {}."])
    return Sample(f"{text}\n\n{question.format(names[asked])}", f"The code of {names[asked]} is", numbers[asked])


def shopping(draw: random.Random, sentences: int) -> Sample:
    """See above: `list`."""
    first, *others = draw.sample(GOODS, 5)
    items, name = f"{', '.join(others[:-1])}, and {others[-1]}", draw.choice(NAMES)
    text = _hidden(draw, [f"{name} buys {first}, {items}."], sentences)
    return Sample(f"{text}\n\nWhat does {name} buy?", f"{name} buys {first},", items)


def opening(draw: random.Random, sentences: int) -> Sample:
    """See above."""
    name, *others = draw.sample(NAMES, 4)
    facts = [f"{other} {draw.choice(_DID)}." for other in others]
    text = f"My name is {name}. {_hidden(draw, facts, sentences)}"
    question = draw.choice(["What is my name?", "Do you remember my name?", "Now tell me my name."])
    return Sample(f"{text}\n\n{question}", "Your name is", name)


def instruction(draw: random.Random, sentences: int) -> Sample:
    """See above."""
    word, kind = draw.choice(WORDS), draw.choice(("answer", "reply", "text"))
    text = f'End your {kind} with the word "{word}".\n\n{_hidden(draw, [], sentences)}'
    return Sample(f"{text}\n\nNow end it.", 'The word is "', word)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    "codes": codes,
    "list": shopping,
    "opening": opening,
    "instruction": instruction,
}
"""By name: from a random generator and the number of sentences between the facts to a sample."""


def make_sample(task: str, seed: int, index: int, sentences: int) -> Sample:
    """Sample `index` of a task's data set `seed`: the same whatever else is drawn."""
    return TASKS[task](random.Random(f"{task} {seed} {index} {sentences}"), sentences)
