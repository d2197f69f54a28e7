"""Generated conversations: each turn's prompt is everything before it and a new message."""

from bisect import bisect
from itertools import accumulate
from random import Random

from emberkv.errors import WorkloadError
from emberkv.workload.bounds import MOST_SECONDS, MOST_TOKENS, MOST_TURNS
from emberkv.workload.content import Content, Span, stream_key
from emberkv.workload.distributions import whole
from emberkv.workload.request import After, Request
from emberkv.workload.spec import GeneratedWorkload, Profile, SystemPrompts


class SystemPromptShelf:
    """The prompts of one set, the most popular first, each of a length drawn once."""

    def __init__(self, prompts: SystemPrompts, rng: Random, *names: str) -> None:
        self._contents = [
            Content([Span(stream_key(*names, rank), 0, whole(prompts.tokens.sample(rng), least=0))])
            for rank in range(prompts.count)
        ]
        self._cumulative = list(accumulate((rank + 1) ** -prompts.skew for rank in range(prompts.count)))

    def choose(self, rng: Random) -> Content:
        """Zipf's law: the k-th is chosen in proportion to k^-skew."""
        at = bisect(self._cumulative, rng.random() * self._cumulative[-1])
        return self._contents[min(at, len(self._contents) - 1)]


class Library:
    """What all conversations of a workload share. name: in every stream's key, so that no other workload has these."""

    def __init__(self, workload: GeneratedWorkload) -> None:
        self.name = stream_key(workload.model_dump_json()).hex()
        self.workload = workload
        self._weights = list(accumulate(profile.weight for profile in workload.clients))
        self._shelves = {
            name: SystemPromptShelf(prompts, Random(f"{workload.seed}/system/{name}"), self.name, "system", name)
            for name, prompts in workload.system_prompts.items()
        }

    def choose_profile(self, rng: Random) -> Profile:
        at = bisect(self._weights, rng.random() * self._weights[-1])
        return self.workload.clients[min(at, len(self._weights) - 1)]

    def choose_system_prompt(self, profile: Profile, rng: Random) -> Content:
        return Content() if profile.system_prompts is None else self._shelves[profile.system_prompts].choose(rng)


class Conversation:
    """Session ``number`` of a workload. It has random numbers of its own, so that what it says depends on no other."""

    def __init__(self, library: Library, number: int) -> None:
        self._rng = Random(f"{library.workload.seed}/session/{number}")
        self._workload = library.name
        self.session_id = f"s{number}"
        self.profile = library.choose_profile(self._rng)
        self._history = library.choose_system_prompt(self.profile, self._rng)
        self._turns_left = whole(self.profile.turns.sample(self._rng), most=MOST_TURNS)
        self._turn = 0

    def first(self, at: float) -> Request:
        """The first turn; it goes whatever its length."""
        profile = self.profile
        message = profile.message if profile.first_message is None else profile.first_message
        return self._next(at, whole(message.sample(self._rng)), None)

    def follow_up(self, request: Request, at: float, generated: int) -> Request | None:
        """The turn after ``request``, which completed at ``at`` with ``generated`` tokens; None when all is said."""
        if self._turns_left == 0:
            return None
        profile = self.profile
        self._history = request.content.cut(0, request.prompt_tokens + generated)
        think_time = profile.think_time.sample(self._rng)
        message = whole(profile.message.sample(self._rng))
        turn = self._next(at + think_time, message, After(request.request_id, think_time))
        if profile.max_context is not None and turn.prompt_tokens + turn.max_output_tokens > profile.max_context:
            return None
        return turn

    def _next(self, arrival: float, message: int, after: After | None) -> Request:
        limit = self.profile.max_output_tokens
        drawn = whole(self.profile.output.sample(self._rng))
        output = drawn if limit is None else min(drawn, limit)
        said = Span(stream_key(self._workload, self.session_id, self._turn, "message"), 0, message)
        answer = Span(stream_key(self._workload, self.session_id, self._turn, "answer"), 0, output)
        prompt = len(self._history) + message
        if prompt > MOST_TOKENS:
            raise WorkloadError(
                f"client {self.profile.name}: a conversation has grown to {prompt:,} tokens; "
                f"at most {MOST_TOKENS:,} are accepted, and max_context ends one sooner"
            )
        if arrival > MOST_SECONDS:
            raise WorkloadError(
                f"client {self.profile.name}: a request arrives after {arrival:g} s; the limit is {MOST_SECONDS:g}"
            )
        request = Request(
            request_id=f"{self.session_id}.{self._turn}",
            arrival_time=arrival,
            prompt_tokens=prompt,
            output_tokens=output,
            max_output_tokens=output if limit is None else limit,
            content=self._history + Content([said, answer]),
            client_id=self.profile.name,
            session_id=self.session_id,
            turn=self._turn,
            after=after,
        )
        self._turn += 1
        self._turns_left -= 1
        return request
