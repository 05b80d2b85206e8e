"""A conversation with a run, in a terminal or through a pipe."""

import sys
from collections.abc import Sequence
from contextlib import suppress

from khanhllm.draw import on_terminal, visible
from khanhllm.errors import UserError
from khanhllm.inference.sample import reseeded
from khanhllm.runs.run import Run
from khanhllm.schema import Sampling

HELP = """\
/system TEXT   begin anew, with this system message (none without TEXT)
/new           begin anew
/undo          forget the last question and its answer
/help          this list
/quit          leave, as Ctrl-D does; Ctrl-C ends an answer"""


class Talk:
    """Questions from the standard input, answers to the standard output."""

    def __init__(self, run: Run, sampling: Sampling, system: str = "", stops: Sequence[str] = ()) -> None:
        self.run_, self.sampling, self.stops = run, sampling, stops
        self.messages: list[dict[str, str]] = []
        self.lines, self.missed = 0, False
        self.system = system if system.strip() else ""
        self.screen = on_terminal()
        self.person = self.screen and sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        """Talk until the input ends. The exit code: 2 if nobody was there to see that a question was not answered."""
        if sys.stdin is None or sys.stdout is None:
            raise UserError("khanhllm chat needs standard input and output, and one of them is closed")
        if self.person:
            with suppress(ImportError):
                import readline  # noqa: F401  arrow keys, and earlier questions
            print("/help lists what else can be typed; Ctrl-D leaves", file=sys.stderr)
        while (line := self._line()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                break
            if self._command(word, rest.strip()):
                continue
            if self.person and word.startswith("/"):  # on a pipe it is a question, such as one about /usr/bin
                self._tell(f"{word} is unknown; /help lists what can be typed")
            elif word:
                self._answer(line)
        return 2 if self.missed else 0

    def _line(self) -> str | None:
        """The next line; None at the end."""
        try:
            line = input("> " if self.person else "")
            self.lines += 1
            line.encode()  # in the locale C, Python makes surrogates of bytes that are no text
            return line
        except EOFError:
            if self.person:
                print()
            return None
        except UnicodeError:
            raise UserError("the standard input is not UTF-8 text") from None
        except KeyboardInterrupt:  # of a line that is being typed
            if not self.person:
                raise
            print()
            return ""

    def _command(self, word: str, rest: str) -> bool:
        if word == "/help":
            self._tell(HELP)
        elif word in ("/new", "/system"):
            self.messages = []
            self.system = rest if word == "/system" else self.system
        elif word == "/undo":
            self.messages = self.messages[:-2]
        else:
            return False
        return True

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        system = [{"role": "system", "content": self.system}] * bool(self.system)
        said = ""
        settings = reseeded(self.sampling, len(self.messages)).model_dump()
        try:
            for piece in self.run_.stream_chat([*system, *asked], self.stops, **settings):
                said += piece
                print(visible(piece) if self.screen else piece, end="", flush=True)
            print(flush=True)
        except UserError as error:
            self._miss(str(error))
            return
        except KeyboardInterrupt:
            if not self.person:
                raise
            print(" …")
        if said.strip():  # what was not answered is forgotten
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def _miss(self, why: str) -> None:
        """Say why a question is not answered. On a pipe an empty line stands for the answer, so that the others still
        belong to their questions."""
        if self.person:
            return self._tell(why)
        print(flush=True)
        self.missed = True
        self._tell(f"line {self.lines}: {why}")

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
