"""Where each token went is told as it is read, and to those alone who ask."""

import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm.inference.engine import Engine, Job
from khanhllm.inference.routes import routes, watched
from khanhllm.lab import closing
from khanhllm.schema import Sampling

IDS = [0, 5, 7, 9, 11]


@pytest.fixture(scope="module", params=["modern", "classic"])
def model(request):
    return build(tiny(request.param, pattern="MDM", context=64), seed=3)


class Asked:
    """A job that is told everything."""

    def __init__(self, ids=IDS, routed=True, closed=(), tokens=6):
        self.routes, self.scores = [], []
        self.job = Job(ids, Sampling(tokens=tokens, seed=1), self.hear, lambda *_: None, top=1, closed=dict(closed))
        self.job.route = self.routes.extend if routed else None

    def hear(self, score):
        self.scores.append(score)
        return False

    @property
    def text(self):
        return [score.token for score in self.scores]


def work(model, *asked, rows=4):
    engine = Engine(model, plain_machine(), 300, rows, 8)
    engine.submit(*(one.job for one in asked))
    while engine.turn():
        pass
    return engine


def alone(model, text):
    with torch.no_grad(), watched(model) as chosen:
        model.logits(torch.tensor([text]))
    return routes(chosen, 1)[0]


def same(one, other):
    assert [[[e for e, _ in layer] for layer in token] for token in one] == [
        [[e for e, _ in layer] for layer in token] for token in other
    ]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_route_for_each_token_that_was_read(model, rows):
    first, second, silent = Asked(), Asked(IDS[:1]), Asked(routed=False)
    work(model, first, second, silent, rows=rows)
    for one, ids in ((first, IDS), (second, IDS[:1])):
        text = [*ids, *one.text[:-1]]  # nobody has read the last token
        same(one.routes, alone(model, text))
        for token in one.routes:
            assert len(token) == 2 and all(sum(w for _, w in layer) == pytest.approx(1, abs=1e-5) for layer in token)
    assert silent.routes == [] and silent.text == first.text


def test_what_was_read_before_is_read_again_for_a_job_that_asks(model):
    first, again = Asked(routed=False), Asked()
    engine = work(model, first)
    engine.submit(again.job)
    while engine.turn():
        pass
    assert len(again.routes) == len(IDS) + 5 and engine.counts["reused"] == 0


def test_no_token_enters_a_closed_expert_and_others_keep_their_bits(model):
    before, closed = Asked(), Asked(closed={2: [0, 3]})
    work(model, before)
    plain, other = Asked(), Asked(closed={2: [0, 3]})
    work(model, plain, other)
    assert all({e for e, _ in token[1]} <= {1, 2} for token in other.routes)
    assert any({e for e, _ in token[0]} & {0, 3} for token in other.routes)  # the other mixture is as it was
    assert plain.text == before.text
    assert [s.logprob for s in plain.scores] == pytest.approx([s.logprob for s in before.scores], abs=1e-5)
    work(model, closed)
    assert [s.logprob for s in other.scores] == pytest.approx([s.logprob for s in closed.scores], abs=1e-5)
    assert [s.logprob for s in other.scores] != pytest.approx([s.logprob for s in plain.scores], abs=1e-5)


def test_a_mixture_of_closed_experts_adds_nothing(model):
    off = Asked(closed={2: [0, 1, 2, 3]})
    work(model, off)
    assert all(token[1] == [] and token[0] for token in off.routes)
    with closing.changed(model, 2, closing.off()):
        nothing = Asked()
        work(model, nothing)
    assert off.text == nothing.text
    assert [s.logprob for s in off.scores] == pytest.approx([s.logprob for s in nothing.scores], abs=1e-6)
