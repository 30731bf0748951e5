"""A replica's fake GPU: a cache of token slots, staging, and a model that reveals wrong reads.

The next token is a hash of all the KV in the sequence's blocks and window. So a block that is
overwritten, freed too early or filled from the wrong place changes the tokens. Freed blocks are
wiped in the order of the plan, like the writes of their next owner would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from serve.protocol.messages import NUM_STAGING_SLOTS
from serve.protocol.plan import Entry, PostReceive, SampleRow, Send, Step, StepSequence, Unpack
from serve.replica.replica import Replica
from serve.replica.sequence import OUT_OF_WINDOW_BLOCK
from serve.request import Request

VOCAB_SIZE = 1009
EOS = 7

Block = list[int | None]


@dataclass(frozen=True, slots=True)
class Wipe:
    """A plan entry that wipes blocks that were freed at this point of the plan."""

    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FakeModel:
    """The KV of a token is the token itself or, with a window, a hash of the KV that it sees.

    So with a window every token reads KV, not only the ones that are sampled from, and a wrong read
    changes all later tokens.
    """

    window: int | None = None

    def first_seen(self, position: int) -> int:
        """Return the first position that a token at ``position`` reads."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def make_kv(self, token: int, seen: Iterable[int]) -> int:
        """Compute the KV of ``token`` from ``seen``, the KV from ``first_seen`` on."""
        return token if self.window is None else _hash([*seen, token])

    def next_token(self, seen: Iterable[int]) -> int:
        """Compute the next token from the KV, including the last token's. Any change changes it."""
        return _hash(seen) % VOCAB_SIZE

    def expected_output(self, request: Request) -> list[int]:
        """Compute the output of a request on its own."""
        kv: list[int] = []
        for token in request.prompt_ids:
            kv.append(self.make_kv(token, kv[self.first_seen(len(kv)) :]))
        output: list[int] = []
        while len(output) < request.sampling.max_tokens:
            output.append(self.next_token(kv[self.first_seen(len(kv) - 1) :]))
            kv.append(self.make_kv(output[-1], kv[self.first_seen(len(kv)) :]))
            if output[-1] == EOS and not request.sampling.ignore_eos:
                break
        return output


def _hash(values: Iterable[int]) -> int:
    value = 1
    for item in values:
        value = (value * 31 + item + 1) % 2_147_483_647
    return value


@dataclass
class Wires:
    """The transfers between GPUs, by prefill replica, decode replica and push number."""

    sent: dict[tuple[int, int, int], list[Block]] = field(default_factory=dict)
    posted: dict[tuple[int, int, int], int] = field(default_factory=dict)


@dataclass
class FakeReplica:
    """One replica with its fake GPU: a cache of token slots, staging, a queue of entries.

    If the model has a window, block 0 is never used, so that any use of a placeholder is noticed.
    """

    replica: Replica
    num_blocks: int  # without block 0 if that is never used
    block_size: int
    model: FakeModel
    plan: deque[Entry | Wipe] = field(default_factory=deque)
    sends: deque[Send] = field(default_factory=deque)  # packed in order, on a stream of its own
    staging: dict[tuple[int, int], list[Block]] = field(default_factory=dict)
    results: deque[list[int]] = field(default_factory=deque)
    sampled: list[int] = field(default_factory=list)  # by the last step
    expected: dict[str, list[int]] = field(default_factory=dict)  # outputs, by request

    def __post_init__(self) -> None:
        self.pool = self.replica._pool
        self.cache: list[Block] = [[None] * self.block_size for _ in range(self.pool.num_blocks)]
        if self.model.window is not None:
            assert self.pool.allocate(1) == [OUT_OF_WINDOW_BLOCK]
        free = self.pool.free

        def free_and_wipe(blocks: Iterable[int]) -> None:
            freed = tuple(blocks)
            free(freed)
            self.plan.append(Wipe(freed))

        self.pool.free = free_and_wipe  # type: ignore[method-assign]

    # --- the leader's plan ----------------------------------------------------------------

    def add(self, entry: Entry) -> None:
        """Queue an entry, and check that all blocks that it reads or writes have an owner.

        Packing has a stream of its own, so it may run before entries that were queued earlier.
        """
        match entry:
            case Step():
                for sequence in entry.sequences:
                    self._check_owned(sequence.block_table[self._first_block(sequence) :])
            case Send() | Unpack():
                self._check_owned(entry.block_ids)
        if isinstance(entry, Send):
            self.sends.append(entry)
        else:
            self.plan.append(entry)

    def _first_block(self, sequence: StepSequence) -> int:
        return self.model.first_seen(sequence.start) // self.block_size

    def _check_owned(self, block_ids: Iterable[int]) -> None:
        for block in block_ids:
            self._check(block)
            assert not self.pool._is_free[block], f"block {block} is used and free"

    def _check(self, block: int) -> None:
        assert block != OUT_OF_WINDOW_BLOCK or self.model.window is None, "a placeholder is used"

    # --- the GPU --------------------------------------------------------------------

    def execute(self, entry: Entry | Wipe, wires: Wires, node_id: int) -> None:
        match entry:
            case Step():
                self.results.append(self._step(entry))
            case PostReceive(prefill_replica, number, num_blocks):
                wires.posted[(prefill_replica, node_id, number)] = num_blocks
            case Unpack(prefill_replica, number, block_ids):
                slot = (prefill_replica, number % NUM_STAGING_SLOTS)
                blocks = self.staging.pop(slot)
                for block, content in zip(block_ids, blocks, strict=bool(block_ids)):
                    self.cache[block] = list(content)
            case Wipe(block_ids):
                for block in block_ids:
                    self.cache[block] = [None] * self.block_size

    def pack(self, wires: Wires, node_id: int) -> None:
        """Pack the oldest push and put its blocks on the wire."""
        send = self.sends.popleft()
        key = (node_id, send.decode_replica, send.number)
        wires.sent[key] = [list(self.cache[block]) for block in send.block_ids]

    def _step(self, step: Step) -> list[int]:
        tokens: list[int] = []
        before, known = self.sampled, range(VOCAB_SIZE)
        for sequence in step.sequences:
            for position, token in enumerate(sequence.token_ids, sequence.start):
                value = token if token in known else before[known.start - 1 - token]
                self._compute(sequence.block_table, position, value)
            if sequence.sample:
                self._check_history(step.rows[len(tokens)], value)
                last = sequence.start + len(sequence.token_ids) - 1
                seen = range(self.model.first_seen(last), last + 1)
                table = sequence.block_table
                tokens.append(self.model.next_token([self._read(table, i) for i in seen]))
        self.sampled = tokens
        return tokens

    def _check_history(self, row: SampleRow, input_id: int) -> None:
        """Check that penalties get the prompt and all output tokens so far."""
        if not row.request.sampling.has_penalties:
            return
        if row.request.id not in self.expected:
            self.expected[row.request.id] = self.model.expected_output(row.request)
        expected = self.expected[row.request.id]
        if row.output_index <= len(expected):  # else the request has ended and its token is dropped
            history = [*row.request.prompt_ids, *expected[: row.output_index]]
            assert [*row.token_ids[: len(history) - 1], input_id] == history

    def _compute(self, table: tuple[int, ...], position: int, token: int) -> None:
        if self.model.window is not None:
            seen = range(self.model.first_seen(position), position)
            token = self.model.make_kv(token, [self._read(table, i) for i in seen])
        block = table[position // self.block_size]
        self._check(block)
        self.cache[block][position % self.block_size] = token

    def _read(self, table: tuple[int, ...], position: int) -> int:
        block = table[position // self.block_size]
        self._check(block)
        token = self.cache[block][position % self.block_size]
        return -1 if token is None else token
