"""Carrying out a `Keeping` during one forward pass: what the blocks of one network tell each other.

Shapes: B samples, T tokens of the layout, S tokens of all samples together, D width, H heads, dh head width.
A packed batch flows as one long sample, (1, S, D), so that blocks need not know of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.gathering import first_of, fused, kept_first, key_bias, mean_of_valid, taken
from models.keeping import Keeping, Need, Signals
from models.ragged import Packing, narrowed, pack, packing_of, ragged_attention, unpack
from utils.errors import RunError

if TYPE_CHECKING:
    from models.base import PrunableModel

Dense = Callable[[Tensor | None], Tensor]
# shown the block, the scores and what is eligible, both (B, T), before anything is chosen
Listener = Callable[[int, Tensor, Tensor], None]


@dataclass
class Seen:
    """What one forward pass did, block by block.

    Attributes:
        entered: Tokens of each sample before any went, (B,).
        width: The same with padding.
        attention: Tokens of each sample that entered the attention, (B,) a block.
        mlp: Tokens of each sample that entered the MLP, (B,) a block.
        executed: Tokens a sample that attention and MLP were computed for, padding included; where samples
            are packed, those of the longest.
        packed: Whether attention and MLP ran on packed samples, without padding.
        positions: Where the tokens that entered the MLP stood in the input, (B, T); -1 for none or a fused one.
        fused: Of how many tokens a sample each block made a fused one, by its position.
    """

    entered: Tensor
    width: int
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    executed: list[tuple[int, int]] = field(default_factory=list)
    packed: list[tuple[bool, bool]] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    fused: dict[int, int] = field(default_factory=dict)

    @property
    def counts(self) -> Tensor:
        """Tokens that entered each half, (B, L, 2)."""
        return torch.stack([torch.stack(half, dim=1) for half in (self.attention, self.mlp)], dim=-1)


@dataclass(frozen=True)
class _Layout:
    """Which places of (B, T) hold tokens; None for `valid` as long as all do."""

    positions: Tensor
    protected: Tensor
    valid: Tensor | None = None
    packing: Packing | None = None

    @property
    def shape(self) -> tuple[int, int]:
        # whole numbers also under a tracer, which gives tensors
        return int(self.positions.shape[0]), int(self.positions.shape[1])

    @property
    def there(self) -> Tensor:
        return torch.ones_like(self.protected) if self.valid is None else self.valid

    @property
    def lengths(self) -> Tensor:
        return self.there.sum(1)


class KeepingFlow:
    """Drops tokens between the halves of blocks, or before them; the blocks share it.

    Attributes:
        keeping: What to drop where.
        protected: Tokens in front that are never dropped.
        watch: Whether to keep what a pass did in `seen`.
        listener: Shown the scores before anything is chosen.
    """

    def __init__(self, keeping: Keeping, protected: int) -> None:
        self.keeping, self.protected = keeping, protected
        self.watch, self.listener = False, None
        self._forget()

    listener: Listener | None
    seen: Seen | None = None
    _given: tuple[Tensor | None, Tensor | None] = (None, None)

    def _forget(self) -> None:
        self._layer, self._started = -1, False
        self._now: _Layout | None = None
        self._signals: dict[str, Tensor] = {}
        self._untouched = True
        self._unsound: list[tuple[int, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts anew, also from a pass that broke off
        blank = KeepingFlow(self.keeping, self.protected)
        return vars(blank) | {"_given": (None, None)}

    def begin(self, valid: Tensor | None, special: Tensor | None) -> None:
        """Say of the next pass which tokens there are and which must stay, (B, T) bool each; None: all, none."""
        self._given = (valid, special)

    def enter(self, x: Tensor, layer: int) -> Tensor:
        """Begin a block: (B, T, D), with fewer tokens if they go before the attention."""
        if layer == 0:
            self._start(x)
        elif layer != self._layer + 1:
            raise RunError(
                f"block {layer} ran after block {self._layer}: blocks of a network that drops tokens must run "
                "one after the other, each once; scores that replay some of them need a network that drops none"
            )
        self._layer, self._signals = layer, {}
        x = self._reduced(x) if self.keeping.before == "attention" else x
        self._note("attention", x)
        return x

    def in_front(self, layer: int) -> bool:
        """Whether a block asks for the tokens in front alone: none does."""
        return False

    def asking(self, x: Tensor) -> Tensor:
        """The tokens for which the present block asks and answers: all of them."""
        return x

    def leave_attention(self, x: Tensor) -> Tensor:
        """Between the halves of a block: (B, T, D), with fewer tokens if they go before the MLP."""
        x = self._reduced(x) if self.keeping.before == "mlp" else x
        self._signals = {}
        self._note("mlp", x)
        return x

    def leave(self, x: Tensor) -> Tensor:
        """End a block; after the last one packed tokens go back to (B, T, D)."""
        if self._layer == self.keeping.blocks - 1 and self._here.packing is not None:
            return unpack(x[0], self._here.packing)
        return x

    def mean(self, x: Tensor, front: int) -> Tensor:
        """Mean over the tokens behind the first `front`: (B, T, D) -> (B, D)."""
        valid = self._here.valid
        return x[:, front:].mean(dim=1) if valid is None else mean_of_valid(x[:, front:], valid[:, front:])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dense: Dense, given: Tensor | None = None
    ) -> Tensor:
        """Mix values (B, H, T, dh), and keep what the rule must see.

        Args:
            q: Queries, (B, H, T, dh).
            k: Keys, of the same shape.
            v: Values, of the same shape.
            scale: Factor on the logits.
            dense: The network's own attention, which takes a mask or None.
            given: The network's own mask; used as long as no token has gone.
        """
        needs = self._needs()
        if "values" in needs:
            self._signals["values"] = v.transpose(1, 2)  # (B, H, T, dh) -> (B, T, H, dh)
        if self._here.packing is not None:
            return self._attend_packed(q, k, v, scale, needs)
        bias = given if self._untouched else self._bias(q.dtype)
        if "received" in needs and q.shape[1]:
            attention = self._probabilities(q, k, scale)
            self._signals["received"] = _received(attention, self._here.there)
            return attention.to(v.dtype) @ v
        if "attention" in needs:
            self._signals["attention"] = self._probabilities(q[:, :, :1], k, scale)[:, :, 0].mT  # (B, T, H)
        return dense(bias)

    @property
    def idle(self) -> bool:
        """Whether no token has gone yet, and nothing of the attention is looked at in this block."""
        return self._untouched and not self._needs()

    def check(self) -> None:
        """Raise a RunError if a score of the last pass was not finite; waits for a GPU."""
        for layer, count in self._unsound:
            if found := int(count):
                raise RunError(
                    f"prune={self.keeping.rule.name}: block {layer}: {found} scores of tokens are NaN or infinite; "
                    "every score must be finite"
                )
        self._unsound = []

    @property
    def _here(self) -> _Layout:
        assert self._now is not None, "a block ran before the first one"
        return self._now

    def _start(self, x: Tensor) -> None:
        valid, special = self._given
        self._given = (None, None)
        self._forget()
        index = torch.arange(x.shape[1], device=x.device)
        protected = (index < self.protected).expand(len(x), -1)
        if valid is not None:
            protected = protected & valid
        if special is not None:
            protected = protected | special
        # counted from the sample's own first token, so that padding in front changes nothing
        places = index.expand(len(x), -1) if valid is None else valid.cumsum(1) - 1
        self._now = _Layout(places, protected, valid)
        self.seen = Seen(self._now.lengths, x.shape[1]) if self.watch else None

    def _step(self) -> int | None:
        """The rule's step at this block; None where it drops nothing."""
        if self._layer not in self.keeping.layers:
            return None
        step = self.keeping.layers.index(self._layer)
        return None if self.keeping.rule.idle(step) and self.listener is None else step

    def _needs(self) -> frozenset[Need]:
        return frozenset() if self._step() is None else self.keeping.rule.needs

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self._here.valid is None else key_bias(self._here.valid, dtype)

    def _probabilities(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Attention of some queries (B, H, Q, dh) to all keys, (B, H, Q, T), float32 at least."""
        logits = (q * scale) @ k.mT
        bias = self._bias(logits.dtype)
        logits = logits if bias is None else logits + bias
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, scale: float, needs: frozenset[Need]) -> Tensor:
        packing = self._here.packing
        assert packing is not None
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))  # (1, H, S, dh) -> (S, H, dh)
        if "attention" in needs:
            first = q.index_select(0, packing.first).index_select(0, packing.sample_of)  # (S, H, dh)
            logits = unpack((first * scale * k).sum(-1), packing)  # (B, T, H)
            logits = logits.float().masked_fill(~self._here.there.unsqueeze(-1), -torch.inf)
            self._signals["attention"] = pack(logits.softmax(dim=1), packing)[None]
        if "received" in needs and q.shape[1]:
            # every row of the attention is looked at, which no ragged kernel shows
            wide = [unpack(part, packing).transpose(1, 2) for part in (q, k)]
            received = _received(self._probabilities(wide[0], wide[1], scale), self._here.there)
            self._signals["received"] = pack(received, packing)[None]
        mixed = ragged_attention(q, k, v, packing, scale=scale)
        return mixed.transpose(0, 1)[None]  # (S, H, dh) -> (1, H, S, dh)

    def _reduced(self, x: Tensor) -> Tensor:
        step = self._step()
        if step is None:
            return x
        here, rule = self._here, self.keeping.rule
        scores = rule.scores(self._seen_by_rule(x))
        if here.packing is not None:
            scores = unpack(scores[0], here.packing)  # (S,) -> (B, T)
        eligible = here.there & ~here.protected
        self._refuse_unsound(scores, eligible)
        if self.listener is not None:
            self.listener(self._layer, scores, eligible)
            if rule.idle(step):
                return x
        keep = (rule.chosen(scores, eligible, step) & eligible) | (here.there & here.protected)
        return self._without(x, keep, scores, step)

    def _seen_by_rule(self, x: Tensor) -> Signals:
        here, found = self._here, self._signals
        positions = here.positions if here.packing is None else pack(here.positions, here.packing)[None]
        missing = {}
        if "attention" in self.keeping.rule.needs and "attention" not in found:  # no head is left
            missing["attention"] = x.new_zeros(*x.shape[:2], 1)
        if "received" in self.keeping.rule.needs and "received" not in found:
            missing["received"] = x.new_zeros(x.shape[:2])
        if "values" in self.keeping.rule.needs and "values" not in found:
            missing["values"] = x.new_zeros(*x.shape[:2], 1, 1)
        return Signals(self._layer, x, positions, **(found | missing))  # type: ignore[arg-type]

    def _refuse_unsound(self, scores: Tensor, eligible: Tensor) -> None:
        self._unsound.append((self._layer, ((~torch.isfinite(scores)) & eligible).sum()))
        # a GPU would be waited for, and compiled code would end here; there `check` asks
        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check()

    def _without(self, x: Tensor, keep: Tensor, scores: Tensor, step: int) -> Tensor:
        here, keeping = self._here, self.keeping
        known = self._known_width(step)
        if known == here.shape[1]:
            return x
        fuse = None
        if keeping.fuse != "none":
            gone = here.there & ~keep
            fuse = (self._fused(x, scores * gone), gone.any(1, keepdim=True))
        if keeping.batching == "mask":
            return self._masked(x, keep, fuse)
        if keeping.batching == "pack" and known is None:
            return self._packed(x, keep, fuse)
        return self._padded(x, keep, fuse, known)

    def _known_width(self, step: int) -> int | None:
        """Tokens that every sample is left with, where that is known without looking at them."""
        here = self._here
        front = self.protected
        if here.valid is not None or not self.keeping.rule.exact or self.keeping.special:
            return None
        eligible = here.shape[1] - front
        return front + min(self.keeping.rule.most(eligible, step), eligible)

    def _fused(self, x: Tensor, weights: Tensor) -> Tensor:
        how = "mean" if self.keeping.fuse == "mean" else "sum"
        packing = self._here.packing
        if self.seen is not None:
            self.seen.fused[self._layer] = self._here.shape[1]
        return fused(x if packing is None else unpack(x[0], packing), weights, how)  # (B, 1, D)

    def _padded(self, x: Tensor, keep: Tensor, fuse: tuple[Tensor, Tensor] | None, known: int | None) -> Tensor:
        here = self._here
        if known is None:
            counts = keep.sum(1)
            least, width = (int(n) for n in torch.stack([counts.min(), counts.max()]).tolist())
            if least == here.shape[1]:
                return x
            valid = None if least == width else first_of(counts, width)
        else:
            width, valid = known, None
        index = kept_first(keep, width)
        x, positions, protected = taken(x, index), taken(here.positions, index), taken(here.protected, index)
        there = None
        if valid is not None:
            positions, protected, there = positions.masked_fill(~valid, -1), protected & valid, valid
        self._now, self._untouched = _Layout(positions, protected, there), False
        if fuse is None:
            return x
        # dropped tokens are known to be there only where every sample drops the same number
        return self._appended(x, fuse[0], None if known is not None else fuse[1])

    def _masked(self, x: Tensor, keep: Tensor, fuse: tuple[Tensor, Tensor] | None) -> Tensor:
        here = self._here
        self._now = replace(here, positions=here.positions.masked_fill(~keep, -1), valid=keep)
        self._untouched = False
        return x if fuse is None else self._appended(x, *fuse)

    def _appended(self, x: Tensor, token: Tensor, there: Tensor | None) -> Tensor:
        """Put one token behind the others of every sample; `there` says for which samples, (B, 1)."""
        here = self._here
        nowhere = torch.full_like(here.positions[:, :1], -1)
        valid = None
        if there is not None or here.valid is not None:
            valid = torch.cat([here.there, torch.ones_like(nowhere, dtype=torch.bool) if there is None else there], 1)
        places, mine = torch.cat([here.positions, nowhere], 1), torch.zeros_like(nowhere, dtype=torch.bool)
        self._now = _Layout(places, torch.cat([here.protected, mine], 1), valid)
        return torch.cat([x, token], dim=1)

    def _packed(self, x: Tensor, keep: Tensor, fuse: tuple[Tensor, Tensor] | None) -> Tensor:
        here = self._here
        if here.packing is None:
            packing = packing_of(keep)
            if packing.total == keep.numel():  # nothing goes, and the dense kernels run on
                return x
            flat = pack(x, packing)
        else:
            stays = pack(keep, here.packing)
            chosen = stays.nonzero().flatten()
            flat, packing = x[0].index_select(0, chosen), narrowed(here.packing, stays, chosen)
        self._untouched = False
        self._now = replace(here, positions=here.positions.masked_fill(~keep, -1), valid=keep, packing=packing)
        if fuse is None:
            return flat[None]
        wide = self._appended(unpack(flat, packing), *fuse)  # (B, T + 1, D)
        self._now = replace(self._here, packing=packing_of(self._here.there))
        assert self._now.packing is not None
        return pack(wide, self._now.packing)[None]

    def _note(self, half: str, x: Tensor) -> None:
        if self.seen is None:
            return
        here, seen = self._here, self.seen
        (seen.attention if half == "attention" else seen.mlp).append(here.lengths)
        packed = here.packing is not None
        width = int(here.lengths.max()) if packed else x.shape[1]
        if half == "attention":
            seen.executed.append((width, width))
            seen.packed.append((packed, packed))
        else:
            seen.executed[-1] = (seen.executed[-1][0], width)
            seen.packed[-1] = (seen.packed[-1][0], packed)
            seen.positions.append(here.positions)


def _received(attention: Tensor, valid: Tensor) -> Tensor:
    """Mean over heads and valid queries of attention (B, H, T, T): what each token gets, (B, T)."""
    rows = attention.mean(1) * valid.unsqueeze(-1)  # (B, T, T)
    return rows.sum(1) / valid.sum(1, keepdim=True)


def flow_of(model: "PrunableModel") -> KeepingFlow:
    """What the blocks of a network that drops tokens share."""
    return model.network.get_submodule(model.blocks()[0]).flow  # type: ignore[return-value]


@contextmanager
def watched_tokens(flow: KeepingFlow, listener: Listener | None = None) -> Iterator[KeepingFlow]:
    """Keep what passes do in `flow.seen`, and show scores to a listener, for the block."""
    flow.watch, flow.listener = True, listener
    try:
        yield flow
    finally:
        flow.watch, flow.listener, flow.seen = False, None, None
