"""Every key of the configuration.

One frozen `Config` decides a run; `settings` reads its values. Nothing here imports torch, so `--help` answers at once.

Wrong input raises pydantic's ValidationError; `settings.checked` makes a `UserError` of it, one line that says why.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from khanhllm.units import whole

Count = Annotated[int, Field(ge=1, le=2**40)]
Natural = Annotated[int, Field(ge=0, le=2**40)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4000)]
LAYERS = r"^[DM]{1,256}$"
SHARES = r"^([1-9][0-9]{0,3}(,[1-9][0-9]{0,3}){1,63})?$"
DEVICE = r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"
NAME = r"^[^\x00]*$"
Name = Annotated[Text, Field(pattern=NAME)]  # of a file


def _takes(kind: Any, *numbers: type) -> bool:
    """Whether an annotation allows numbers of one of these types."""
    return kind in numbers or any(_takes(part, *numbers) for part in get_args(kind))


class Section(BaseModel):
    """A frozen group of keys, whose docstrings are their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, given: Any) -> Any:
        """Whole numbers may come as text such as 10k or 1GB. Python takes True for 1; as text it is refused."""
        if not isinstance(given, Mapping):
            return given
        read = dict(given)
        for key in given.keys() & cls.model_fields.keys():
            kind, value = cls.model_fields[key].annotation, given[key]
            if isinstance(value, bool) and _takes(kind, int, float):
                read[key] = str(value).lower()
            elif isinstance(value, str) and _takes(kind, int) and (number := whole(value)) is not None:
                read[key] = number
        return read


class ModelConfig(Section):
    style: Literal["classic", "modern"] = "modern"
    """classic: LayerNorm, learned positions, GELU, biases. modern: RMSNorm, RoPE, QK-norm, SwiGLU, no biases"""
    pattern: Annotated[str, Field(pattern=LAYERS)] = "DMDM"
    """one letter per layer: D dense, M mixture of experts"""
    dim: Annotated[int, Field(ge=8, le=65536)] = 256
    """width of the residual stream (features)"""
    heads: Annotated[int, Field(ge=1, le=1024)] = 4
    """query heads; dim / heads features each"""
    kv_heads: Annotated[int, Field(ge=0, le=1024)] = 0
    """key and value heads shared by groups of query heads; 0 means as many as heads"""
    hidden: Annotated[int, Field(ge=8, le=2**20)] = 1024
    """inner width of a dense feed-forward (features)"""
    expert_hidden: Annotated[int, Field(ge=0, le=2**20)] = 0
    """inner width of one expert (features); 0 means the same as hidden"""
    experts: Annotated[int, Field(ge=1, le=512)] = 8
    """experts in each mixture layer"""
    experts_per_token: Annotated[int, Field(ge=1, le=512)] = 2
    """experts that each token is sent to (top k); with 1, the router's probability weighs the answer (Switch)"""
    feedforward: Literal["swiglu", "relu2"] = "swiglu"
    """inside of dense layers and experts (modern only). relu2, ReLU squared, has two matrices instead of three"""
    value_embedding: bool | Literal["normed"] = False
    """learned vectors of the token itself join attention's values (modern only); all tools can read normed ones"""
    value_every: Annotated[int, Field(ge=1, le=256)] = 2
    """they join every so-manieth layer, back from the last: vocab_size x dim x kv_heads / heads parameters each"""
    token_norm: bool = False
    """each token's vector is divided by its root mean square, so it cannot outgrow what layers add (modern only)"""
    token_shift: bool = False
    """learned numbers, at first zero, add the position before to each layer's input, by feature (modern only)"""
    stream_scale: bool = False
    """a learned number multiplies the residual stream before each layer (modern only); embedding_skip has it too"""
    embedding_skip: bool = False
    """the input of each layer is a learned mixture of the previous layer's output and the embedding (modern only)"""
    pair_embedding: Annotated[int, Field(ge=0, le=2**30)] = 0
    """learned vectors for pairs of neighbouring tokens, chosen by a hash and added to the second's (modern only)"""
    router_bias: bool = False
    """a bias moves the router's choice of experts, but not their weights, towards an even load; see loss.bias_rate"""
    zero_out: bool = False
    """start matrices that write into the residual stream at zero, so that at first no layer changes anything"""
    induction_head: bool = False
    """initial values that let a small model copy early from text that repeats itself (modern only)"""
    context: Annotated[int, Field(ge=2, le=2**20)] = 256
    """longest text the model sees at once (tokens)"""
    vocab_size: Annotated[int, Field(ge=264, le=2**24)] = 50_000
    """size of the vocabulary, special tokens included (tokens)"""
    rope_theta: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10_000.0
    """base of the rotary position frequencies (modern only)"""
    norm_eps: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    """added under the square root of every norm"""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads: {self.dim} % {self.heads} = {self.dim % self.heads}")
        if self.style == "modern" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even dim / heads, got {self.head_dim}")
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        modern = ["value_embedding", "token_norm", "token_shift", "stream_scale", "embedding_skip", "induction_head"]
        keys = {"feedforward": "swiglu", "pair_embedding": 0} | dict.fromkeys(modern, False)
        if self.style == "classic" and any(getattr(self, key) != keys[key] for key in keys):
            raise ValueError(f"choices of style modern: {', '.join(k for k in keys if getattr(self, k) != keys[k])}")
        if self.induction_head and (self.zero_out or self.heads < 2 or len(self.pattern) < 2):
            raise ValueError("induction_head needs two layers, two heads, and zero_out = false; or set it to false")
        if self.moe_layers and self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) exceeds experts ({self.experts})")
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def expert_width(self) -> int:
        return self.expert_hidden or self.hidden

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer, letter in enumerate(self.pattern) if letter == "M"]


class DataConfig(Section):
    source: Name = "c4"
    """where the text comes from: stdlib, a file, folder or glob (.txt .jsonl .json.gz .jsonl.zst .parquet .csv .tsv
    .warc.gz), c4, hf://datasets/ORG/NAME[/config][:split], http(s)://... (many files: part-{000..099}.csv or
    {a,b}.txt), or a folder written by `khanhllm prepare`; of json lines and tables the column "text", else content,
    document, body or article, or the one named after a '#': my.csv#title"""
    tokenizer: Name = ""
    """tokenizer.json to use; empty means to train one on the source, with model.vocab_size tokens"""
    tokenizer_sample: Count = 1_000_000_000
    """most text the tokenizer is trained on (bytes)"""
    validation: Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)] = 0.01
    """share of the documents held out for validation, chosen by a hash of the text"""
    clean: Name = ""
    """steps that clean the documents first, in order: c4, paragraphs, gopher, language:CODE, spans (repeated
    sentences), minhash (near-duplicates); empty means none. As in "c4, language:en, gopher" """
    bad: Literal["refuse", "skip"] = "refuse"
    """at a file that cannot be read or is not UTF-8, end with a line that names it, or skip the rest and count it"""
    tokens: Natural = 0
    """training tokens taken from a large or distant source before it is read again; 0 means all of it"""
    shard_tokens: Annotated[int, Field(ge=256, le=2**31)] = 2**24
    """length of a shard that is made while the model trains (tokens); rows are shuffled within it"""
    ahead: Annotated[int, Field(ge=1, le=1000)] = 2
    """shards kept ready ahead of the training (shards)"""
    disk: Count = 20_000_000_000
    """most disk for shards that the run has trained on (bytes); beyond it, the oldest of them are removed"""
    patience: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """time without any answer from the network until the run saves and stops (seconds)"""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """processes that prepare the data; 0 means one for each core"""
    cache: Name = "shards"
    """folder that keeps prepared shards, so that the next run on the same source starts at once"""
    base: Name = ""
    """folder of the shards of the run that this one goes on from: a part of its held-out text shows, in the log's
    base_bpb, what is forgotten, and rows of its text may be replayed; empty means none"""
    replay: Fraction = 0.0
    """share of the rows that come from data.base; which ones they are depends on train.seed and their number alone"""


class TrainConfig(Section):
    steps: Count = 1000
    """optimizer steps in the whole run"""
    seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    """time to train, with saving and all validations but the last (seconds); sets the schedule; 0: steps decides"""
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] | Literal["auto"] = 8
    """rows of `context` tokens in one forward and backward pass; auto means as many as fit into the memory, by the
    simulation of `khanhllm plan`; a step keeps the rows that it has without auto"""
    accumulation: Annotated[int, Field(ge=1, le=2**20)] = 1
    """micro-batches in one optimizer step (gradient accumulation); with micro_batch auto: rows in a step"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """decides the initial weights, the order of the data and the samples"""
    eval_every: Natural = 100
    """steps between validations; 0 means only at the end"""
    eval_tokens: Count = 100_000
    """validation tokens read each time during training (tokens)"""
    save_every: Natural = 500
    """steps between checkpoints; 0 means only at the end"""
    keep: Annotated[int, Field(ge=1, le=10_000)] = 2
    """newest checkpoints kept (folders)"""
    keep_best: bool = True
    """also keep the saved checkpoint with the lowest validation loss, if that is none of the newest"""
    sample_every: Natural = 500
    """steps between samples of generated text; 0 means only at the end"""
    sample_tokens: Annotated[int, Field(ge=0, le=100_000)] = 64
    """length of each sample (tokens)"""
    sample_prompt: Text = ""
    """text that each sample continues; empty means a fresh document"""
    targets: Literal["all", "answers"] = "all"
    """tokens whose loss counts. answers: data.source holds conversations (docs/chat.md), of which only what the
    assistant says counts, and the token that ends it; a document without roles counts wholly"""
    document_mask: bool = False
    """begin attention, positions and pairs anew with each document; else a token also sees those before its own"""

    @property
    def rows(self) -> int:
        """Rows in one micro-batch; one while auto is undecided."""
        return 1 if self.micro_batch == "auto" else self.micro_batch

    @property
    def rows_per_step(self) -> int:
        return self.rows * self.accumulation


class OptimConfig(Section):
    name: Literal["adamw", "adamw8bit", "muon", "muon8bit"] = "adamw"
    """adamw keeps fp32 moments; adamw8bit keeps them in 8 bits (bitsandbytes), 75 % smaller; muon orthogonalises the
    updates of hidden matrices and leaves all else to adamw; muon8bit has a momentum of 8 bits, and adamw8bit"""
    lr: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1e-3
    """peak learning rate"""
    beta1: Beta = 0.9
    """decay of the gradient's running mean"""
    beta2: Beta = 0.95
    """decay of the squared gradient's running mean"""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """added to the denominator of the update"""
    weight_decay: Rate = 0.1
    """decoupled weight decay of matrices (per step, times the learning rate)"""
    clip: Rate = 1.0
    """longest gradient (L2 norm over all parameters); 0 means no clipping"""
    muon_lr: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 0.02
    """peak learning rate of the hidden matrices (muon only; lr is that of embedding, head, router, norms and biases)"""
    momentum: Beta = 0.95
    """decay of the gradient's running mean in the hidden matrices (muon only)"""
    embedding_lr: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """peak learning rate of the embedding tables; 0 means lr"""
    head_lr: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """peak learning rate of the output matrix; 0 means lr"""
    router_lr: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """peak learning rate of the routers; 0 means lr, which is too much for them where muon's small models do well"""
    router_beta1: Beta = 0.0
    """decay of the running mean of the routers' gradient, which is mostly noise; 0 means beta1"""
    expert_out_lr: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """peak learning rate of the matrices by which experts write into the residual stream (muon only); 0 means muon_lr.
    sqrt(experts_per_token) times muon_lr makes up for the weights, by which the router takes a mean of their answers"""
    expert_momentum: Beta = 0.0
    """momentum of the experts' matrices (muon only), which see fewer tokens in each step; 0 means momentum"""
    expert_every: Annotated[int, Field(ge=1, le=64)] = 1
    """update each stack of experts once in so many steps, the square root of that number as far, in turns (muon)"""
    base_dim: Annotated[int, Field(ge=0, le=65536)] = 0
    """model.dim at which the rates were tuned. At another, those of matrices under adamw (all of them, or muon's head
    and routers) are multiplied by base_dim / dim, so that tuned rates transfer to other widths (muP); 0 leaves them"""
    newton_schulz: Annotated[int, Field(ge=1, le=5)] = 4
    """iterations that orthogonalise an update (muon only)"""


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine: warm up, then half a cosine down. wsd: warm up, hold, then a straight line down"""
    warmup: Natural = 100
    """steps of linear warm-up: at most half of train.steps, or a twentieth of train.seconds (then 20 steps or more)"""
    decay: Fraction = 0.2
    """share of the run, at its end, in which the rate goes down (wsd only)"""
    floor: Fraction = 0.1
    """learning rate at the end, as a share of the peak"""
    tied_experts: Fraction = 0
    """share of the run, at its start, in which the experts learn together, as one dense layer; then they part"""


class LossConfig(Section):
    balance: Rate = 0.01
    """weight of the load-balancing loss, summed over mixture layers (Switch Transformer)"""
    load: Literal["previous", "current"] = "previous"
    """load of the experts that weighs their balancing loss: of the step before, or this one's, for one more forward"""
    bias_rate: Rate = 0.001
    """how far the bias of model.router_bias moves in each step (probability)"""
    router_z: Rate = 0.001
    """weight of the router z-loss, summed over mixture layers (ST-MoE)"""
    chunk: Annotated[int, Field(ge=1, le=2**20)] = 512
    """rows of logits that exist at one time (tokens)"""


class GuardConfig(Section):
    spike: Rate = 10.0
    """reject a loss this many robust deviations, and a nat, above the last 128's median; 0: only what is not finite"""
    patience: Annotated[int, Field(ge=1, le=10_000)] = 3
    """steps rejected in a row until the run asks earlier rows whether the text has changed; if not, it goes back"""
    returns: Annotated[int, Field(ge=0, le=10_000)] = 2
    """times it goes back to its last good checkpoint until it stops (exit code 76)"""


class MachineConfig(Section):
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes the first accelerator found"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """fp32; tf32 matrix products; bf16 autocast with fp32 weights; auto takes the fastest the device has"""
    weights: Literal["fp32", "bf16"] = "fp32"
    """type of the matrices. bf16 takes half the memory, for weights and for what passes from layer to layer; updates
    are then rounded stochastically (needs precision bf16, which auto then means)"""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """type of the gradients summed over the micro-batches of a step; bf16 takes half the memory (bf16 weights only)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for each block; auto means on for CUDA, off elsewhere. Where it fails, the run goes on without"""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """activations recomputed in the backward pass: none, selective (all but matrix products), full (sub-layers)"""
    experts: Literal["auto", "loop", "grouped", "triton"] = "auto"
    """backend of experts: a plain loop, torch's grouped_mm, or our Triton kernels, for cards on which grouped_mm makes
    the host wait; auto tries each on a tiny problem and takes the best that works"""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 means as many as OMP_NUM_THREADS says, or without that one for each core"""
    processes: Annotated[int, Field(ge=0, le=64)] = 0
    """processes of this machine that train the model together, with a GPU each if there are any: a step keeps its rows,
    and they share its micro-batches. 0 means one, or as many as torchrun started"""
    shares: Annotated[str, Field(max_length=400, pattern=SHARES)] = ""
    """micro-batches of each process, for unequal GPUs: 3,1 gives the first three of four; empty means equally many"""
    split: Literal["optimizer", "all"] = "optimizer"
    """what several processes divide among them: the optimizer's moments; or all, for what does not fit into one GPU:
    weights and gradients too, which are then sent in each micro-batch"""
    expert_processes: Annotated[int, Field(ge=1, le=64)] = 1
    """neighbouring processes that share each mixture layer's experts, an equal part on each, and send each other the
    tokens; for experts that do not fit into one card. 1 means that every process holds all"""
    patience: Annotated[float, Field(ge=1, le=86400, allow_inf_nan=False)] = 600.0
    """time without an answer from another process until the run ends, with exit code 75 (seconds)"""

    @model_validator(mode="after")
    def _rungs_fit(self) -> Self:
        if self.weights == "bf16" and self.precision not in ("auto", "bf16"):
            raise ValueError(f"weights = bf16 needs precision = bf16 (got {self.precision})")
        if self.gradients == "bf16" and self.weights != "bf16":
            raise ValueError("gradients = bf16 needs weights = bf16 too")
        if self.split == "all" and self.weights == "bf16":
            raise ValueError("split = all needs weights = fp32, which it sends in bf16 to a device that computes in it")
        if self.shares and (self.split == "all" or self.expert_processes > 1):
            raise ValueError("split = all and expert_processes need equally many micro-batches: leave shares empty")
        if self.split == "all" and self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"split = all needs device = auto, cuda or cpu (got {self.device})")
        if self.expert_processes > 1 and self.split == "all":
            raise ValueError("split = all cuts experts too: with it, leave expert_processes at 1")
        return self


class LogConfig(Section):
    every: Count = 10
    """steps between rows of experts.csv, and between plain lines when the output is not a terminal"""
    tensorboard: bool = False
    """also write TensorBoard files into the run folder (needs the extra: pip install 'khanhllm[tensorboard]')"""


class Sampling(Section):
    """How `generate` draws tokens; not part of a run."""

    tokens: Annotated[int, Field(ge=0, le=10_000_000)] = 200
    """longest continuation (tokens)"""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.8
    """0 takes the likeliest token, 2 is wild"""
    top_k: Natural = 0
    """only the k likeliest tokens; 0 means all"""
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    """only the likeliest tokens that together have this probability"""
    min_p: Fraction = 0.05
    """only tokens at least this likely, relative to the likeliest"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """the same seed writes the same text"""


class Config(Section):
    """All that decides a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    guard: GuardConfig = GuardConfig()
    machine: MachineConfig = MachineConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _experts_are_shared_evenly(self) -> Self:
        parts, experts = self.machine.expert_processes, self.model.experts if self.model.moe_layers else 0
        if parts > 1 and (not experts or experts % parts):
            raise ValueError(f"machine.expert_processes ({parts}) must divide the experts of a layer ({experts})")
        tied = experts and self.schedule.tied_experts
        if tied and (parts > 1 or self.machine.split == "all"):
            raise ValueError("no tied experts with split = all or expert_processes: set schedule.tied_experts to 0")
        if tied and experts % self.model.experts_per_token:
            raise ValueError("tied experts need experts_per_token to divide experts; or set schedule.tied_experts to 0")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Target tokens in one optimizer step."""
        return self.train.rows_per_step * self.model.context
