"""Writes expected_metrics.json: what the public packages say of random answers and captions.

Run it in an environment of its own, with Java for the Penn Treebank's tokenizer:

    pip install pycocoevalcap==1.2 anls==0.0.2 rouge-score==0.1.2 Levenshtein loguru numpy pyyaml sacrebleu
    pip install --no-deps lmms-eval==0.7.3
    LC_ALL=C.UTF-8 python tests/expected_metrics.py
"""

import importlib
import itertools
import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import anls
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

DRAWN = random.Random(0)
CASES = 220


def lmms(name):
    """A module of lmms-eval, without the packages that all of it needs."""
    root = str(Path(find_spec("lmms_eval").origin).parent)
    for package in ("tasks", "api"):
        module = sys.modules.setdefault(f"lmms_eval.{package}", ModuleType(package))
        module.__path__ = [f"{root}/{package}"]
    for absent in ("lmms_eval.verifiers", "lmms_eval.verifiers.openai", "lmms_eval.llm_judge", "pandas"):
        sys.modules.setdefault(absent, MagicMock())
    plain = SimpleNamespace(register_metric=lambda **_: lambda f: f, register_aggregation=lambda _: lambda f: f)
    sys.modules["lmms_eval.api.registry"] = plain
    return importlib.import_module(f"lmms_eval.{name}")


def pick(*values):
    return DRAWN.choice(values)


def some(values, least, most):
    return [DRAWN.choice(values) for _ in range(DRAWN.randint(least, most))]


SHORT = """water 3349 1,324 13.50 $4,500 12% June 10:30 The the Coca-Cola Dr. John o'neil isn't isnt two Two none yes
    No ab-cd (555) 2004/05 #7 Q3 R&D co., ltd man's mans don't dont they're 3.5 .5 5. a an red? blue! x_y café ten"""


def answer():
    return pick(" ", " ", "  ").join(some(SHORT.split(), 1, 4))


def misread(text):
    """A few characters are other ones."""
    letters = list(text)
    for _ in range(DRAWN.randint(0, 3)):
        place = DRAWN.randrange(len(letters) or 1)
        letters[place : place + DRAWN.randint(0, 1)] = pick("", "x", " ", ",", "7")
    return pick("", "", " ") + "".join(letters) + pick("", "", "\n")


def of_anls():
    """Where the similarity is the threshold, the package says 0 and the competition's own script 0.5."""
    cases = []
    while len(cases) < CASES:
        answers = [answer() for _ in range(DRAWN.randint(1, 3))]
        said = misread(pick(*answers))
        score = anls.anls_score(said, answers)
        flavour = lmms("api.metrics").anls(answers, [said])["anls"]
        if 1 - score != 0.5 and anls.anls_score(said, answers, threshold=0.5 + 1e-9) == score:
            cases.append([said, answers, score, flavour])
    return cases


def of_vqa():
    utils, cases = lmms("tasks.textvqa.utils"), []
    lists = lmms("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor.CONTRACTIONS
    mended = [x for pair in lists.items() for x in pair]
    for number in range(CASES):
        truth, other = (answer(), answer()) if number % 2 else some(mended, 2, 2)
        people = [pick(truth, truth, other, misread(truth), truth.capitalize()) for _ in range(10)]
        said = pick(truth, other, misread(truth), truth + ".", truth.upper(), "the " + truth)
        score = utils.textvqa_process_results({"answers": list(people), "question_id": 0}, [said])["exact_match"]
        cases.append([said, people, score])
    return cases


def of_relaxed():
    relaxed, cases = lmms("tasks.chartqa.utils").relaxed_correctness, []
    for _ in range(CASES):
        right = pick("12", "0.35", "35%", "-4.2", "0", "1e3", "Yes", "Blue", "1,000", "2019", "12.5%", "nan")
        try:
            near = float(right.rstrip("%")) * pick(1, 1.05, 0.95, 1.0501, 0.9499, 1.02, 2, -1)
            said = pick(f"{near:g}", f"{near:.3f}", f"{near:g}%", right)
        except ValueError:
            said = pick(right, right.lower(), "red", "1000")
        cases.append([said, right, float(relaxed(said, right))])
    return cases


def of_contained():
    process, cases = lmms("tasks.ocrbench.utils").ocrbench_process_results, []
    for number in range(CASES):
        formula = number % 4 == 0
        right = [
            pick(answer(), "x ^ 2 + Y", "\\frac { a } { b }", "ＡＢＣ１２", "two\nlines") for _ in range(pick(1, 2))
        ]
        wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in right[0])
        said = pick(right[0], f"It says {right[0].upper()}.", misread(right[0]), right[0].replace(" ", ""), wide)
        doc = {"answer": right, "dataset": "HME100k" if formula else "IIIT5K", "question_type": ""}
        cases.append([said, right, formula, float(process(doc, [said])["ocrbench_accuracy"]["score"])])
    return cases


def of_letters():
    """Of answers that name one letter: where none is named, lmms-eval guesses."""
    parse, cases = lmms("tasks._task_utils.mmmu_mcq_utils").parse_mmmu_multi_choice_response, []
    choices = ["a red car", "two dogs", "3.5 metres", "the left one", "none of them"]
    for _ in range(CASES):
        offered = choices[: DRAWN.randint(2, 5)]
        letter, other, right = (pick(*"ABCDE"[: len(offered)]) for _ in range(3))
        text = offered["ABCDE".index(letter)]
        said = pick(
            "{0}", "({0})", "{0}.", "{0}. {1}", "({0}) {1}", "The answer is {0}.", "The answer is ({0}) {1}.",
            "Answer: {0}", "({2}) cannot be, so that I take ({0})", "From the picture one can see {1}, as it is there",
        ).format(letter, text, other)  # fmt: skip
        found = parse(said, list("ABCDE"[: len(offered)]), dict(zip("ABCDE", offered)))
        cases.append([said, offered, right, float(found == right)])
    return cases


def of_open():
    utils, cases = lmms("tasks.mmmu.utils"), []
    numbers = ["3.5", "12", "1,200", "-4", "0.333", "7.125", "2e3", "10%"]
    for _ in range(CASES):
        right = [pick(*numbers, "trapezoid", "Vitamin B", "x", "red") for _ in range(pick(1, 1, 2))]
        value = pick(*right, *numbers, "blue")
        said = pick(
            "{}", "{}.", "The answer is {}.", "x = {}", "It is {} or so.", "First 2 + 2 = 4.\nThus we get {}", "{} cm",
            "So the result is {}", "between {} and 900",
        ).format(value)  # fmt: skip
        cases.append([said, right, float(utils.eval_open(right, utils.parse_open_response(said)))])
    return cases


def of_math():
    """Of bare answers: of others lmms-eval asks a language model what they say."""
    judge, cases = lmms("tasks.mathvista.utils").mathvista_evaluator, []
    for number in range(CASES):
        kind = ("integer", "float", "list", "choice")[number % 4]
        choices, precision = [], None
        if kind == "integer":
            right, said = str(DRAWN.randint(0, 20)), pick("{0}", "{0}.0", "{0}.7", "{1}", "-{0}")
        elif kind == "float":
            precision = DRAWN.randint(1, 2)
            right, said = str(round(DRAWN.uniform(0, 9), precision)), pick("{0}", "{0}4", "{1}", "{1}.5")
        elif kind == "list":
            right, said = str(some(range(2000, 2010), 2, 3)), pick("{0}", "[1, 2]", "{1}")
        else:
            choices = DRAWN.choice([["red", "blue", "green"], ["B", "A"], ["1", "2", "3", "4"]])
            right, said = DRAWN.choice(choices), pick("{0}", "({2})", "{2}", "{3}")
        letter = pick(*"ABCD"[: max(1, len(choices))])
        said = said.format(right, DRAWN.randint(0, 9), letter, DRAWN.choice(choices or [""]))
        types = ("multi_choice", "text") if choices else ("free_form", kind)
        found = judge.normalize_extracted_answer(said, choices, *types, precision)
        cases.append([said, right, kind, precision, choices, float(judge.safe_equal(found, right))])
    return cases


def of_prompts():
    """Of MathVista and MMMU, with the options of lmms-eval's own tasks."""
    math, mmmu, cases = lmms("tasks.mathvista.utils"), lmms("tasks.mmmu.utils"), []
    format_ = {"shot": 0, "shot_type": "format-prompt", "use_caption": False, "use_ocr": False}
    letter = "Answer with the option's letter from the given choices directly."
    words = "Answer the question using a single word or phrase."
    for number in range(40):
        choices = [answer() for _ in range(DRAWN.randint(2, 5))] if number % 3 == 0 else []
        kind = "text" if choices else pick("integer", "float", "list")
        more = {
            "unit": pick(None, "cm", "$"),
            "precision": float(pick(1, 2)) if kind == "float" else None,
            "question_type": "multi_choice" if choices else "free_form",
            "answer_type": kind,
        }
        doc = {"question": f"What of {answer()}?".strip(), "choices": choices, **more}
        cases.append(["mathvista", doc["question"], choices, more, math.mathvista_doc_to_text(doc, format_)])
        doc |= {"options": str(choices), "question_type": "multiple-choice" if choices else "open"}
        cases.append(["mmmu", doc["question"], choices, {}, mmmu.construct_prompt(doc, letter, words)])
    return cases


WORDS = """a the man woman dog dogs' child's riding standing on near with street red t-shirt black-and-white 3 1,234
    3.5 10:30 50% $3.50 No. Mr. St. U.S. p.m. e.g. don't isn't it's they're we've I'll cannot gonna and/or 1/2 3rd 21st
    1990s '90s up-side-down "STOP" (red) [blue] & ... -- , . ! ? ; rock'n'roll o'clock y'all Ph.D. Inc. 20th-century
    #tag 100,000 -5 7-11 C++ AT&T TV's 2x4 °C £5 €10 5¢ ½ café it’s “quoted” a/c skateboard table pizza"""
PLAIN = "man woman dog riding skateboard on street red blue near large tree with people standing kitchen table"


def caption():
    words = [
        pick(*PLAIN.split()) if DRAWN.random() < 0.6 else pick(*WORDS.split()) for _ in range(DRAWN.randint(4, 10))
    ]
    return " ".join(words) + pick("", ".", " .", "!")


def like(text):
    words = text.split()
    for _ in range(DRAWN.randint(0, 3)):
        words[DRAWN.randrange(len(words))] = pick(*PLAIN.split())
    return " ".join(words[: DRAWN.randint(len(words) - 2, len(words))])


def tokens(texts):
    """Of one text after another."""
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [found[i][0] for i in range(len(texts))]


def of_captions():
    right = [[caption()] for _ in range(CASES)]
    right = [texts + [like(texts[0]) for _ in range(DRAWN.randint(0, 2))] for texts in right]
    said = [like(pick(*texts)) for texts in right]
    flat = iter(tokens([*said, *itertools.chain(*right)]))
    results = {i: [next(flat)] for i in range(CASES)}
    references = {i: [next(flat) for _ in texts] for i, texts in enumerate(right)}
    cider, of_cider = Cider().compute_score(references, results)
    _, rouge = Rouge().compute_score(references, results)
    few = [range(i, i + 10) for i in range(CASES - 10)]
    bleus = [
        Bleu(4).compute_score({i: references[i] for i in some}, {i: results[i] for i in some}, verbose=0)[0][3]
        for some in few
    ]
    return {
        "said": said,
        "right": right,
        "tokens": [results[i][0] for i in range(CASES)],
        "cider": [float(x) for x in of_cider],
        "cider_mean": float(cider),
        "rouge_l": [float(x) for x in rouge],
        "bleu_4_of_ten": [float(x) for x in bleus],
    }


if __name__ == "__main__":
    found = {name[3:]: make() for name, make in list(globals().items()) if name.startswith("of_")}
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
