"""llama.cpp itself, from Python: a few of its C functions through ctypes, in a process of their own, because it answers
what it does not like by aborting, and because two releases do not fit into one process.

`make llama` fetches the libraries. Two facts of the C interface are used throughout: a large structure is returned
through a pointer and passed as a copy on the stack, so ours may end in room for fields that we never name.
"""

import ctypes
import io
import json
import os
import platform
import subprocess
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FOLDER = Path(os.environ.get("KHANHLLM_LLAMA_CPP") or Path.home() / ".cache" / "khanhllm" / "llama.cpp")
OLD, NEW = "3.19.0", "3.22.1"
"""releases of the npm package: llama.cpp b9842 (July 2026), which lacks hy_v3, and 0.5.0 (September)"""
Q4_K_M = 15
F32, F16 = 0, 1
LOGGED = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
"""the type of a function that receives what llama.cpp reports"""


def missing(release: str) -> str:
    """Why the tests with this release cannot run; empty if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the libraries of llama.cpp are for Linux on x86-64"
    if not (FOLDER / release).is_dir():
        return f"no llama.cpp in {FOLDER / release}: `make llama` fetches it, KHANHLLM_LLAMA_CPP says where it is"
    return ""


def ask(file: Path, release: str = NEW, **request: object) -> SimpleNamespace:
    """What llama.cpp says about a model, see `_answer`. Raises RuntimeError with its own words if it fails."""
    words = [sys.executable, __file__, str(FOLDER / release), str(file)]
    done = subprocess.run(words, input=json.dumps(request).encode(), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as answer:
        facts = json.loads(str(answer["facts"]))
        return SimpleNamespace(**facts, **{name: answer[name] for name in answer.files if name != "facts"})


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_uint8)),
    ]


class ModelParams(Structure):
    _fields_ = [("rest", c_int64 * 64)]


class QuantizeParams(Structure):
    _fields_ = [("n_threads", c_int32), ("ftype", c_int32), ("rest", c_int64 * 64)]


def _context_params(release: str) -> type[Structure]:
    words = "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq n_threads n_threads_batch"
    words += " ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"
    names = [word for word in words.split() if release != OLD or word != "n_outputs_max_per_seq"]

    class ContextParams(Structure):
        _fields_ = [
            *((name, c_int32) for name in names),
            ("rope", c_float * 8),
            ("cb_eval", c_void_p * 2),
            ("type_k", c_int32),
            ("type_v", c_int32),
            ("rest", c_int64 * 64),
        ]

    return ContextParams


class Runtime:
    """The libraries of one release."""

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(next(folder.glob("libggml.*.so"))), mode=ctypes.RTLD_GLOBAL)
        self.c = ctypes.CDLL(str(next(folder.glob("libllama.*.so"))))
        self.Context = _context_params(folder.name)
        self._declare("llama_model_default_params", ModelParams)
        self._declare("llama_context_default_params", self.Context)
        self._declare("llama_model_quantize_default_params", QuantizeParams)
        self._declare("llama_model_load_from_file", c_void_p, c_char_p, ModelParams)
        self._declare("llama_init_from_model", c_void_p, c_void_p, self.Context)
        self._declare("llama_model_get_vocab", c_void_p, c_void_p)
        self._declare("llama_get_memory", c_void_p, c_void_p)
        self._declare("llama_memory_clear", None, c_void_p, c_bool)
        self._declare("llama_decode", c_int32, c_void_p, Batch)
        self._declare("llama_get_logits", POINTER(c_float), c_void_p)
        self._declare("llama_tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
        for name in ("n_tokens", "bos", "eos"):
            self._declare(f"llama_vocab_{name}", c_int32, c_void_p)
        for name in ("get_add_bos", "get_add_eos"):
            self._declare(f"llama_vocab_{name}", c_bool, c_void_p)
        for name in ("is_eog", "is_control"):
            self._declare(f"llama_vocab_{name}", c_bool, c_void_p, c_int32)
        self._declare("llama_model_desc", c_int32, c_void_p, c_char_p, c_size_t)
        self._declare("llama_model_quantize", c_int32, c_char_p, c_char_p, POINTER(QuantizeParams))
        self.log = LOGGED(lambda level, text, _: level >= 3 and sys.stderr.write(text.decode(errors="replace")))
        for library, name in ((base, "ggml_log_set"), (self.c, "llama_log_set")):
            getattr(library, name)(self.log, None)
        base.ggml_backend_load.restype = c_void_p
        if not base.ggml_backend_load(str(folder / "libggml-cpu-haswell.so").encode()):
            sys.exit("this processor has no AVX2")
        self.c.llama_backend_init()

    def _declare(self, name: str, result: object, *arguments: object) -> None:
        function = getattr(self.c, name)
        function.restype, function.argtypes = result, arguments

    def quantize(self, source: str, target: str, ftype: int) -> None:
        params = self.c.llama_model_quantize_default_params()
        params.n_threads, params.ftype = 1, ftype
        if failed := self.c.llama_model_quantize(source.encode(), target.encode(), byref(params)):
            sys.exit(f"llama_model_quantize returned {failed}")


class Model:
    """A loaded model; by default with a cache in fp32 and attention as we write it, so that only rounding is left."""

    def __init__(self, runtime: Runtime, file: str, n_ctx: int, kv: int = F32, flash: int = 0) -> None:
        self.c = runtime.c
        model = self.c.llama_model_load_from_file(file.encode(), self.c.llama_model_default_params())
        if not model:
            sys.exit("llama.cpp did not load the model")
        self.model, self.vocab = model, self.c.llama_model_get_vocab(model)
        self.tokens = self.c.llama_vocab_n_tokens(self.vocab)
        params = self.c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = kv
        params.flash_attn_type = flash
        self.context = self.c.llama_init_from_model(model, params)
        if not self.context:
            sys.exit("llama.cpp made no context")

    def logits(self, ids: list[int], start: int = 0) -> np.ndarray:
        """(T, V) for ids that follow `start` others."""
        count = len(ids)
        zero = (c_int32 * 1)(0)
        batch = Batch(
            count,
            (c_int32 * count)(*ids),
            None,
            (c_int32 * count)(*range(start, start + count)),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*[ctypes.cast(zero, POINTER(c_int32))] * count),
            (c_uint8 * count)(*[1] * count),
        )
        if start == 0:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        if failed := self.c.llama_decode(self.context, batch):
            sys.exit(f"llama_decode returned {failed}")
        rows = np.ctypeslib.as_array(self.c.llama_get_logits(self.context), (count, self.tokens))
        return rows.copy()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        written: list[int] = []
        new = ids
        for _ in range(count):
            row = self.logits(new, len(ids) + len(written) - len(new))[-1]
            new = [int(row.argmax())]
            written += new
        return written

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 8))()
        count = self.c.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), True, False)
        return ids[:count]

    def facts(self) -> dict[str, object]:
        vocab = self.vocab
        text = ctypes.create_string_buffer(200)
        self.c.llama_model_desc(self.model, text, len(text))
        return {
            "tokens": self.tokens,
            "bos": self.c.llama_vocab_bos(vocab),
            "eos": self.c.llama_vocab_eos(vocab),
            "add_bos": self.c.llama_vocab_get_add_bos(vocab),
            "add_eos": self.c.llama_vocab_get_add_eos(vocab),
            "ends": [token for token in range(self.tokens) if self.c.llama_vocab_is_eog(vocab, token)],
            "controls": [token for token in range(self.tokens) if self.c.llama_vocab_is_control(vocab, token)],
            "description": text.value.decode(),
        }


def _answer(
    folder: str,
    file: str,
    ids: list[list[int]] = (),
    prompt: list[int] = (),
    greedy: int = 0,
    texts: list[str] = (),
    n_ctx: int = 512,
    quantize: int = -1,
    to: str = "",
    **how: int,
) -> None:
    """Write an .npz to stdout: logits of each row of `ids`, the `greedy` tokens after `prompt`, the ids of `texts`, and
    what llama.cpp knows of the vocabulary; or, with `quantize`, only write the file `to` in that type."""
    runtime = Runtime(Path(folder))
    facts, arrays = {}, {}
    if quantize >= 0:
        runtime.quantize(file, to, quantize)
    else:
        model = Model(runtime, file, n_ctx, **how)
        facts = model.facts() | {"ids": [model.tokenize(text) for text in texts]}
        facts["greedy"] = model.greedy(prompt, greedy)
        if ids:
            arrays["logits"] = np.stack([model.logits(row) for row in ids])
    packed = io.BytesIO()
    np.savez(packed, facts=json.dumps(facts), **arrays)
    sys.stdout.buffer.write(packed.getvalue())
    sys.stdout.flush()
    os._exit(0)  # freeing what is in use would abort


if __name__ == "__main__":
    _answer(sys.argv[1], sys.argv[2], **json.load(sys.stdin))
