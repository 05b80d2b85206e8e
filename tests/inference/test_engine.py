"""Rows of one engine do not know of each other: what a job is told depends on the job alone."""

import threading

import pytest
import torch

from conftest import build, plain_machine, tiny
from khanhllm.errors import UserError
from khanhllm.inference import engine as engine_module
from khanhllm.inference.engine import Dead, Engine, Full, Job
from khanhllm.inference.generate import continuation
from khanhllm.schema import Sampling


class Told:
    """A job and what it was told."""

    def __init__(self, ids, enough=None, echo=False, **settings):
        known = {key: settings.pop(key) for key in ("top", "closed", "slides") if key in settings}
        self.scores, self.prompt, self.ends, self.enough = [], [], [], enough
        self.job = Job(ids, Sampling(**{"tokens": 12, **settings}), self.hear, self.over, **known)
        self.job.echo = self.prompt.append if echo else None

    def hear(self, score):
        self.scores.append(score)
        return score.token == self.enough

    def over(self, reason, error):
        self.ends.append((reason, error))

    @property
    def tokens(self):
        return [score.token for score in self.scores]


@pytest.fixture(scope="module")
def model():
    return build(tiny(context=64), seed=3)


def engine_of(model, rows=4, waiting=64):
    return Engine(model, plain_machine(), 300, rows, waiting)


def work(engine, *told):
    engine.submit(*(one.job for one in told))
    while engine.turn():
        pass
    return told


def alone(model, ids, **settings):
    return list(continuation(model, ids, Sampling(**{"tokens": 12, **settings}), plain_machine(), 300))


PROMPTS = [[0], [0, 5, 7], list(range(40)), [0, 5, 7, 9], [9], list(range(30)), [0, 5], [2] * 20, [0, 5, 7]]


@pytest.mark.parametrize("chunk", [128, 8])
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_each_job_is_told_what_it_is_told_alone(model, monkeypatch, rows, chunk):
    monkeypatch.setattr(engine_module, "CHUNK", chunk)
    told = [Told(ids, seed=nth, temperature=1.0) for nth, ids in enumerate(PROMPTS)]
    work(engine_of(model, rows), *told)
    for nth, (one, ids) in enumerate(zip(told, PROMPTS, strict=True)):
        assert one.tokens == alone(model, ids, seed=nth, temperature=1.0)
        assert one.ends == [("length", None)]


def test_a_job_ends_by_its_listener_its_length_or_the_context(model):
    ids = [0, 5, 7]
    third = alone(model, ids)[2]
    stopped, full, nothing = Told(ids, enough=third), Told(ids, tokens=1000), Told(ids, tokens=0)
    exactly = Told(list(range(64)), tokens=5)
    work(engine_of(model), stopped, full, nothing, exactly)
    assert stopped.tokens[-1] == third and stopped.ends == [("stop", None)] and len(stopped.tokens) <= 3
    assert len(full.tokens) == 64 - 3 + 1 and full.ends == [("length", None)]
    assert nothing.tokens == [] and nothing.ends == [("length", None)]
    assert len(exactly.tokens) == 1 and exactly.ends == [("length", None)]


def test_what_was_read_is_not_read_again(model):
    """Neither in a second turn of a conversation, nor for copies of one prompt, nor after a cut."""
    engine = engine_of(model)
    (first,) = work(engine, Told(list(range(30)), tokens=5))
    assert engine.counts == {"read": 30, "reused": 0, "written": 5}
    longer = [*range(30), *first.tokens, 7, 8]
    (second,) = work(engine, Told(longer))
    assert engine.counts["reused"] == 30 + 4  # the last token that was written has not been read
    assert second.tokens == alone(model, longer)
    assert [len(ids) > 0 for ids in engine.cache.ids] == [True, False, False, False]

    engine = engine_of(model)
    work(engine, *(Told(list(range(30)), tokens=5, seed=seed) for seed in range(3)))
    assert engine.counts["read"] == 30 + 1 + 1
    cut = Told(longer, tokens=20)
    engine.submit(cut.job)
    while len(cut.tokens) < 3:
        engine.turn()
    engine.cancel(cut.job)
    engine.turn()
    assert cut.ends == [("cancelled", None)] and len(cut.tokens) == 3 and not engine.busy
    before = engine.counts["reused"]
    work(engine, Told([*longer, *cut.tokens]))
    assert engine.counts["reused"] - before == len(longer) + 2


def test_with_one_row_nothing_is_reused(model):
    engine = engine_of(model, rows=1)
    for _ in range(2):
        work(engine, Told(list(range(30)), tokens=5))
    assert engine.counts["reused"] == 0


def test_a_short_common_beginning_does_not_cost_a_long_text_its_row(model):
    engine = engine_of(model)
    work(engine, Told(list(range(30)), tokens=5))
    work(engine, Told([0, 9, 9]))
    work(engine, Told([*range(30), 8]))
    assert engine.counts["reused"] == 1 + 30


def test_a_long_prompt_does_not_hold_up_those_who_write(model, monkeypatch):
    engine = engine_of(model)
    engine.chunk = 8
    writer, reader = Told([0], tokens=30), Told(list(range(40)))
    engine.submit(writer.job)
    engine.turn()
    engine.submit(reader.job)
    for turn in range(5):
        engine.turn()
        assert len(writer.tokens) == turn + 2
    assert len(reader.tokens) == 2  # its prompt took five turns; the first token and one more in the last


def test_scores_are_those_of_the_whole_text(model, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK", 8)
    ids = [0, *range(40, 70)]
    told = [Told(ids, top=3, echo=True, tokens=4, temperature=0), Told([0, 5, 7], temperature=0)]
    told += [Told(ids, top=0, tokens=4, temperature=0), Told(ids, top=1, echo=True, tokens=0)]
    engine = engine_of(model)
    work(engine, Told(ids))  # which leaves the ids in the cache: an echo must be read from its beginning all the same
    work(engine, *told)
    whole = [*ids, *told[0].tokens]
    with torch.no_grad():
        logprob_TV = model.logits(torch.tensor([whole]))[0, :, :300].log_softmax(-1)
    for one in (told[0], told[3]):
        assert [score.token for score in one.prompt] == ids[1:]
        for place, score in enumerate(one.prompt):
            assert score.logprob == pytest.approx(float(logprob_TV[place, score.token]), abs=1e-4)
            assert [token for token, _ in score.top] == logprob_TV[place].topk(one.job.top).indices.tolist()
    for one in (told[0], told[2]):
        for place, score in enumerate(one.scores, len(ids) - 1):
            assert score.logprob == pytest.approx(float(logprob_TV[place, score.token]), abs=1e-4)
    assert told[0].scores[0].top[0] == (told[0].tokens[0], told[0].scores[0].logprob)
    assert not told[3].scores and told[3].ends == [("length", None)]


def test_closed_experts_are_the_jobs_own(model):
    """Also in the cache: what was read with closed experts serves no job without."""
    ids = list(range(10))
    plain, shut = Told(ids, temperature=0), Told(ids, temperature=0, closed={1: [0, 1, 2, 3]})
    engine = engine_of(model)
    work(engine, shut, plain)
    assert engine.counts["reused"] == 0
    (again,) = work(engine, Told(ids, temperature=0))
    (only,) = work(engine_of(model), Told(ids, temperature=0, closed={1: [0, 1, 2, 3]}))
    assert plain.tokens == again.tokens == alone(model, ids, temperature=0)
    assert shut.tokens == only.tokens != plain.tokens


def test_no_more_wait_than_may(model):
    engine = engine_of(model, rows=2, waiting=1)
    jobs = [Told([0]).job for _ in range(4)]
    with pytest.raises(Full):
        engine.submit(*jobs)
    engine.submit(*jobs[:3])
    with pytest.raises(Full):
        engine.submit(jobs[3])
    while engine.turn():
        pass
    engine.submit(jobs[3])


def test_a_job_cancelled_while_it_waits_is_over(model):
    engine = engine_of(model, rows=1)
    first, second = Told([0]), Told([0])
    engine.submit(first.job, second.job)
    engine.turn()
    engine.cancel(second.job)
    engine.turn()
    assert second.ends == [("cancelled", None)] and not first.ends


def test_a_job_that_gets_its_row_counts_all_the_while(model, monkeypatch):
    engine, seen = engine_of(model), []
    prepare = engine._prepare
    monkeypatch.setattr(engine, "_prepare", lambda *given: seen.append(engine.idle) or prepare(*given))
    work(engine, Told([0]))
    assert seen == [False] and engine.idle


def test_numbers_that_are_not_finite_end_their_own_job(model, monkeypatch):
    engine, real = engine_of(model), engine_module.choose

    def choose(logits_V, sampling, dice):
        return real(logits_V * torch.nan if sampling.seed == 13 else logits_V, sampling, dice)

    monkeypatch.setattr(engine_module, "choose", choose)
    broken, whole = Told([0, 5, 7], seed=13), Told([9])
    work(engine, broken, whole)
    assert [reason for reason, _ in broken.ends] == ["error"] and isinstance(broken.ends[0][1], UserError)
    assert whole.ends == [("length", None)]
    assert [0, 5, 7] not in [ids[:3] for ids in engine.cache.ids]


def test_an_engine_that_dies_tells_everybody(model, monkeypatch):
    engine = engine_of(model, rows=1)
    told = [Told([0, 5]), Told([0])]
    monkeypatch.setattr(engine, "_write", lambda _rows: 1 / 0)
    engine.submit(*(one.job for one in told))
    thread = threading.Thread(target=engine.run)
    thread.start()
    thread.join(60)
    assert isinstance(engine.fault, ZeroDivisionError)
    assert [[reason for reason, _ in one.ends] for one in told] == [["error"], ["error"]]
    with pytest.raises(Dead):
        engine.submit(Told([0]).job)


def test_an_engine_in_a_thread_serves_many_threads_until_it_is_closed(model):
    engine, done = engine_of(model), threading.Semaphore(0)
    thread = threading.Thread(target=engine.run)
    thread.start()
    told = [Told(ids, seed=nth) for nth, ids in enumerate(PROMPTS)]
    for one in told:
        one.job.over = lambda *_: done.release()
    callers = [threading.Thread(target=engine.submit, args=[one.job]) for one in told]
    for caller in callers:
        caller.start()
    for _ in told:
        assert done.acquire(timeout=60)
    assert [one.tokens for one in told] == [alone(model, ids, seed=nth) for nth, ids in enumerate(PROMPTS)]
    endless = Told([0], tokens=50)
    endless.job.hear = lambda _score: engine.close()
    engine.submit(endless.job)
    thread.join(60)
    assert not thread.is_alive() and endless.ends == [("cancelled", None)]
