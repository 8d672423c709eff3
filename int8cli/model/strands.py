"""Functions that can be suspended in the middle. Each runs in its own thread, and only one runs at a time.

Owns the switch between them. A model's forward is not written to be suspended between two blocks, but every sequence
must pass a block before the next block's weights are read. Threads make that possible for any model code, without
knowing it or repeating any of it. Only the strand that the caller waits for ever runs.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class _Closed(BaseException):
    """Unwinds a strand that gets no more answers. A BaseException, so that no `except Exception` in it stops this."""


class Strand(Generic[Question, Answer]):
    """One function that is suspended whenever it asks a question, until `advance` gives it the answer.

    `function` is called with the strand's `ask`, which takes a question and returns the answer.
    """

    def __init__(self, function: Callable[[Callable[[Question], Answer]], None]) -> None:
        self._function = function
        self._questions: SimpleQueue[Question | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer | _Closed | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.finished = False

    def advance(self, answer: Answer | None = None) -> Question | None:
        """Answer the last question (or start the function) and return the next question; None at the end.

        Raises whatever the function raises.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()  # where the system refuses it, there is none to join
            self._thread = thread
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
        """End the function where it is suspended, unless it has ended."""
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
