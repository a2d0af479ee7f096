"""What the demo's export answers, through transformers alone: ``python -m launch.demo.answers runs/demo-hf EXAMPLES``.

The folder's own modelling file runs here, which is why transformers asks for ``trust_remote_code``: it is ours, written
a moment ago by ``convert.to_hf``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from settings import command_parser, path_argument, user_errors

ASKED = 40
"""Number of examples asked, the first ones of the file."""
SHOWN = 2
"""Number of right and of wrong answers shown, the first ones of each."""
_MOST_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """What was asked, what the model generated up to the end of the document, and what is right."""

    question: str
    given: str
    right: str

    @property
    def is_right(self) -> bool:
        """True if it matches the right answer exactly."""
        return self.given == self.right

    def sentence(self) -> str:
        """Verdict, the code with the model's answer, and the right one if that differs."""
        instead = "" if self.is_right else f"      right: {self.right}"
        return f"{'right' if self.is_right else 'wrong'}   {self.question.strip()}  {self.given or 'nothing'}{instead}"


def main() -> int:
    """Ask, count, and show some right and some wrong answers."""
    parser = command_parser("launch.demo.answers", __doc__.splitlines()[0])
    parser.add_argument("folder", type=path_argument, help="what convert.to_hf wrote")
    parser.add_argument("examples", type=path_argument, help="JSON lines with prompt and response")
    arguments = parser.parse_args()
    with user_errors():
        examples = read(arguments.examples)
        answer = generator(arguments.folder)
        answers = [Answer(prompt, answer(prompt), response) for prompt, response in examples]
        print("\n".join(report(answers)))
    return 0


def read(path: Path) -> list[tuple[str, str]]:
    """Prompts and responses of the first examples.

    Raises:
        ValueError: if the file is not there.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; write it with python -m launch.demo.examples {path.parent}")
    lines = path.read_text(encoding="utf-8").splitlines()[:ASKED]
    return [(record["prompt"], record["response"]) for record in map(json.loads, lines)]


def generator(folder: Path) -> Callable[[str], str]:
    """A function that continues a prompt greedily, with the export in ``folder``.

    Raises:
        ValueError: if there is no export.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not an export: it has no config.json; write one with python -m convert.to_hf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    def answer(prompt: str) -> str:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            made = model.generate(tokens, max_new_tokens=_MOST_TOKENS, do_sample=False)
        return str(tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))

    return answer


def report(answers: list[Answer]) -> list[str]:
    """How many are right, and some of the right and wrong ones."""
    right = [answer for answer in answers if answer.is_right]
    wrong = [answer for answer in answers if not answer.is_right]
    shown = [*right[:SHOWN], *wrong[:SHOWN]]
    return [f"{len(right)} of {len(answers)} right, for example:", *(answer.sentence() for answer in shown)]


if __name__ == "__main__":
    raise SystemExit(main())
