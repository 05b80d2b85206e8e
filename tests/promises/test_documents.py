"""Documents in one row do not see each other, and what does not count changes nothing."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm.data import counting
from khanhllm.data.batches import batch_of
from khanhllm.data.counting import Marks, Reading
from khanhllm.inference.score import score
from khanhllm.machine.adapt import adapt
from khanhllm.model.router import Routing
from khanhllm.settings import resolve
from khanhllm.training import step
from khanhllm.training.step import Learner

E, SYSTEM, USER, ASSISTANT, END = MARKS = Marks(0, 1, 2, 3, 4)
READING = Reading(E, MARKS, document_mask=True)
EVERYTHING = {
    "pattern": "DMDM",
    "kv_heads": 2,
    "feedforward": "relu2",
    "value_embedding": True,
    "embedding_skip": True,
    "token_shift": True,
    "pair_embedding": 509,  # of a power of two, few bits of the token before would decide
    "router_bias": True,
}
STYLES = {"classic": ("classic", {}), "modern": ("modern", {}), "everything": ("modern", EVERYTHING)}
G = torch.Generator().manual_seed(5)


def model_of(name):
    style, shape = STYLES[name]
    model = build(tiny(style, **shape))
    with torch.no_grad():  # nothing that a forward reads is zero, as parts of a fresh model are
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return model


def words(number):
    return torch.randint(5, 300, (number,), generator=G).tolist()


def talk(*lengths):
    """A conversation whose turns have so many words, the user's first."""
    ids = [E]
    for turn, length in enumerate(lengths):
        ids += [ASSISTANT if turn % 2 else USER, *words(length), END]
    return ids


def packed(documents, width=33):
    """A row of documents, filled up to 33 ids; or with one end-of-text after them if the width is 0."""
    ids = list(chain.from_iterable(documents))
    return np.array([ids + [E] * max(1, width - len(ids))])


TALKS = [talk(2, 3), talk(4, 2), [E, *words(5)]]


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_a_document_in_a_row_is_what_it_is_alone(style):
    model, row = model_of(style), packed(TALKS)
    batch = batch_of(row, reading=READING)
    together = model.head.logits(model.trunk(batch.inputs_BT, place_BT=batch.place_BT)[0])[0]
    start = 0
    for ids in TALKS:
        alone = model.logits(torch.tensor([ids]))[0]
        torch.testing.assert_close(together[start : start + len(ids)], alone, atol=1e-5, rtol=0)
        start += len(ids)
    without = model.logits(batch.inputs_BT)[0]
    assert (without - together)[len(TALKS[0]) :].abs().max() > 1e-3  # there is something to see


@pytest.mark.parametrize("style", STYLES)
def test_neither_the_future_nor_another_document_has_a_gradient(style):
    model = model_of(style)
    batch = batch_of(packed(TALKS), reading=READING)
    seen = []

    def keep(_module, _inputs, x_BTD):
        x_BTD.retain_grad()
        seen.append(x_BTD)

    model.embedding.register_forward_hook(keep)
    first, here = len(TALKS[0]), len(TALKS[0]) + 4
    model.trunk(batch.inputs_BT, place_BT=batch.place_BT)[0][0, here].sum().backward()
    reached_T = seen[0].grad[0].abs().sum(-1) > 0
    assert reached_T.nonzero().flatten().tolist() == list(range(first, here + 1))


@pytest.mark.parametrize("style", STYLES)
def test_the_loss_of_what_counts_is_that_of_the_whole_head(style):
    model = model_of(style)
    batch = batch_of(packed(TALKS), reading=READING)
    found = []
    for counted_N in (batch.counted_N, None):
        nll, _ = model(*batch[:2], counted_N, batch.place_BT)
        nll = nll if counted_N is not None else nll.flatten()[batch.counted_N]
        nll.sum().backward()
        found.append([nll.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def learner_of(micro_batch=2, rows=2, **settings):
    given = {
        "train": {"micro_batch": micro_batch, "accumulation": rows // micro_batch},
        "optim": {"clip": 0},
        "loss": {"balance": 0.3, "router_z": 0.1},
    }
    return Learner.new(resolve(resolve(tiny().model_dump(), given).model_dump(), settings), plain_machine())


def cut(rows, micro_batch, reading=READING):
    return iter([batch_of(part, 7, reading) for part in np.split(rows, len(rows) // micro_batch)])


def gradient(rows, micro_batch, load="previous"):
    """Of one step, in double precision, and what it logs."""
    learner = learner_of(micro_batch, len(rows), loss={"load": load}, model={"context": rows.shape[1] - 1})
    learner.model.double()
    found = []
    learner.optimizer.step = lambda: found.extend(parameter.grad.clone() for parameter in learner.model.parameters())
    _, row = step.train_step(learner, learner.start(), cut(rows, micro_batch))
    return found, row


EIGHT = np.concatenate([packed(TALKS[nth % 3 :]) for nth in range(6)] + [packed([])] * 2)


def farthest(ours, theirs):
    scale = max(tensor.abs().max().item() for tensor in theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / scale


@pytest.mark.parametrize("load", ["previous", "current"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_is_divided_by_all_that_counts_in_it(micro_batch, load):
    """However it is cut: the last two rows have nothing that counts."""
    (ours, row), (theirs, whole) = gradient(EIGHT, micro_batch, load), gradient(EIGHT, 8, load)
    assert farthest(ours, theirs) < 1e-6
    assert row["loss"] == pytest.approx(whole["loss"], rel=1e-6) and row["counted"] == whole["counted"] > 0
    assert torch.allclose(row["router_z"], whole["router_z"]) and torch.allclose(row["balance"], whole["balance"])


@pytest.mark.parametrize("load", ["previous", "current"])
def test_padding_changes_no_gradient(load):
    """Of the balancing loss neither, which is a mean over the tokens that do not only fill."""
    (ours, row), (theirs, short) = gradient(packed(TALKS), 1, load), gradient(packed(TALKS, 0), 1, load)
    assert farthest(ours, theirs) < 1e-6
    for name in ("loss", "balance", "router_z"):
        assert float(row[name]) == pytest.approx(float(short[name]), rel=1e-6)


def test_the_gradient_is_that_of_the_mean_over_what_counts():
    learner = learner_of(loss={"balance": 0, "router_z": 0}, train={"micro_batch": 8})
    model = learner.model.double()
    batch = batch_of(EIGHT, reading=READING)
    nll, _ = model(*batch[:2], None, batch.place_BT)
    nll.flatten()[batch.counted_N].mean().backward()
    theirs = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ours = []
    learner.optimizer.step = lambda: ours.extend(parameter.grad.clone() for parameter in model.parameters())
    _, row = step.train_step(learner, learner.start(), cut(EIGHT, 8))
    assert farthest(ours, theirs) < 1e-6
    assert row["loss"] == pytest.approx(nll.flatten()[batch.counted_N].mean().item())


def everything_of(learner):
    """Copies of weights, biases of routers and moments."""
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    tensors = [*learner.model.state_dict().values(), *(value for value in moments if isinstance(value, torch.Tensor))]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("rows", [packed([]), packed([[E, USER, *words(31)]])], ids=["padding", "question"])
def test_a_step_without_anything_that_counts_changes_nothing(rows):
    learner = learner_of(model={"router_bias": True})
    state, _ = step.train_step(learner, learner.start(), cut(EIGHT[:2], 2))
    before = everything_of(learner)
    following, row = step.train_step(learner, state, cut(np.concatenate([rows, rows]), 2))
    assert row == {"fault": "", "step": 2, "tokens": 2 * 2 * 32, "counted": 0, "rejected": 0}
    assert following == replace(state, step=2, cursor=2 * 2)
    assert all(torch.equal(a, b) for a, b in zip(everything_of(learner), before, strict=True))


def summed(routings):
    return Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True)))


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_padding_reaches_no_router_s_statistics_and_no_loss(style):
    model = model_of(style)
    short = packed(TALKS, 0)
    full, filled = batch_of(short, reading=READING), batch_of(packed(TALKS), reading=READING)
    assert filled.padding and not full.padding and filled.tokens == full.tokens
    nll, routings = model(*full[:2], *full.extras)
    padded_nll, padded = model(*filled[:2], *filled.extras)
    torch.testing.assert_close(nll, padded_nll, atol=1e-5, rtol=0)
    without, with_padding = summed(routings), summed(padded)
    assert torch.equal(without.load_E, with_padding.load_E)
    torch.testing.assert_close(without.prob_E, with_padding.prob_E)
    torch.testing.assert_close(without.z, with_padding.z)
    _, counting_all = model(*filled[:2], *filled.extras[:2])
    assert not torch.equal(summed(counting_all).load_E, with_padding.load_E)


def test_the_target_of_a_question_changes_nothing():
    """Neither the loss nor any gradient."""
    found = []
    batch = batch_of(packed(TALKS), reading=READING)
    for change in (0, 1):
        model = model_of("modern")
        targets_BT = batch.targets_BT.clone()
        targets_BT[0, 2] += change  # inside the first question
        nll, _ = model(batch.inputs_BT, targets_BT, *batch.extras)
        nll.sum().backward()
        found.append([nll.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


BYTES = np.array([0] * 5 + [1] * 295)


def test_the_score_of_a_padded_row_is_that_of_the_row():
    model, machine = model_of("modern"), plain_machine()
    short, filled = packed(TALKS, 0), packed(TALKS)
    ours, theirs = (score(model, list(rows), BYTES, machine, 2, READING) for rows in (short, filled))
    assert ours.pop("val_ce") == pytest.approx(theirs.pop("val_ce"), abs=1e-6)
    assert ours.pop("val_bpb") == pytest.approx(theirs.pop("val_bpb"), abs=1e-6)
    assert ours == theirs == {"val_bytes": 3 + 2 + 5, "val_tokens": 4 + 3 + 6}


def test_a_score_is_nats_per_token_that_counts():
    model, machine = model_of("modern"), plain_machine()
    batch = batch_of(packed(TALKS), reading=READING)
    with torch.no_grad():
        nll, _ = model(*batch[:2], *batch.extras)
    assert score(model, list(packed(TALKS)), BYTES, machine, 2, READING)["val_ce"] == pytest.approx(nll.mean().item())
    plain = score(model, list(packed(TALKS)), BYTES, machine, 2)
    assert plain["val_tokens"] == 32 and counting.counted(packed(TALKS), MARKS).sum() == 13


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_layers_share_one_mask(precision):
    """A mask that attention would have to convert takes the memory of as many masks as there are layers."""
    model = model_of("everything")
    batch = batch_of(EIGHT, reading=READING)
    kept = []

    def keep(tensor):
        if tensor.shape == (8, 1, 32, 32):
            kept.append(tensor.data_ptr())
        return tensor

    machine = replace(plain_machine(), precision=precision)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), machine.autocast():
        nll, _ = model(*batch[:2], *batch.extras)
    assert torch.isfinite(nll).all() and len(kept) == 4 and len(set(kept)) == 1


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activations_that_are_made_again_see_the_same_documents(kind):
    batch = batch_of(EIGHT, reading=READING)
    found = []
    for checkpointing in ("none", kind):
        model = adapt(model_of("everything"), plain_machine(), checkpointing)
        nll, _ = model(*batch[:2], *batch.extras)
        nll.sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
