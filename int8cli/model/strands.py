"""Functions that can be left standing in the middle: each runs in a thread of its own, one at a time.

Owns the handing over. A model's forward is not written to be suspended between two blocks, yet that is what it takes to
bring every sequence through a block before the next block's weights are read. Threads do it with any model code, since
nothing of it has to be known or repeated; of all strands only the one being waited for ever runs.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class _Closed(BaseException):
    """Unwinds a strand that nobody is going to answer; no `except Exception` on the way may stop it."""


class Strand(Generic[Question, Answer]):
    """One function, run until it asks something, left there until it is answered.

    `function` gets the strand's own `ask`. `advance` runs it to its next question.
    """

    def __init__(self, function: Callable[[Callable[[Question], Answer]], None]) -> None:
        self._function = function
        self._questions: SimpleQueue[Question | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer | _Closed | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.finished = False

    def advance(self, answer: Answer | None = None) -> Question | None:
        """Answer the last question (nothing at the start) and run on. Returns the next question, None at the end.

        What the function raises is raised here.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._answers.put(answer)
        question = self._questions.get()
        if question is None or isinstance(question, BaseException):
            self.finished = True
            self._thread.join()
        if isinstance(question, BaseException):
            raise question
        return question

    def close(self) -> None:
        """End the function where it stands, if it has not ended."""
        if self._thread is not None and not self.finished:
            self.finished = True
            self._answers.put(_Closed())
            self._thread.join()

    def _run(self) -> None:
        ending: BaseException | None = None
        try:
            self._function(self._ask)
        except _Closed:
            pass
        except BaseException as error:
            ending = error
        self._questions.put(ending)

    def _ask(self, question: Question) -> Answer:
        self._questions.put(question)
        answer = self._answers.get()
        if isinstance(answer, _Closed):
            raise answer
        return answer  # type: ignore[return-value]  # None only before the first question
