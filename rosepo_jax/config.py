"""Every configuration key, its default, its unit and its meaning. Files in configs/ start here and override.

Lengths of training are strings in natural units, resolved by `training.optimizer.steps`: "300 steps", "2 epochs",
"6400 examples"; parts of a run may also be "5 %".
"""

from ml_collections import ConfigDict

from rosepo_jax.errors import UserError


def default() -> ConfigDict:
    """The configuration that every file in configs/ overrides."""
    c = ConfigDict()
    c.seed = 0  # of everything that is trained

    c.data = d = ConfigDict()
    d.seed = 0  # of the world, held-out rows and candidate lists: runs with other `seed`s stay comparable
    d.source = "world"  # world | movielens | recbole | table | amazon | llara | sequences | tfds:NAME
    d.path = ""  # folder or file of the source
    d.columns = ConfigDict(  # source = table, tfds:...: which column is which; "" = absent
        dict(user="user", item="item", timestamp="timestamp", rating="", title="title", groups="")
    )
    d.titles = ""  # source = table: a second table with the item and title columns; "" = titles are in the log
    d.min_rating = 0.0  # keep interactions rated at least this
    d.core_user = 5  # k-core: every user keeps at least this many interactions ...
    d.core_item = 5  # ... and every item, iterated until both hold
    d.split = "leave_one_out"  # leave_one_out | global_time | user_ratio | given (by the source)
    d.validation_share = 0.1  # global_time and user_ratio
    d.test_share = 0.1
    d.history = 10  # N: history items in a window
    d.min_history = 3  # rows with fewer history items are left out (and counted)
    d.held_out_share = 0.0  # share of train rows that SFT never sees as targets (for pairs.rows = held_out)
    d.max_validation = 0  # use at most this many validation rows, chosen by hash; 0 = all
    d.max_test = 0  # and of the windows
    d.windows = False  # also keep every step of the test users as a row, for evaluate.protocols = windows
    d.candidates = 20  # C: the target and C-1 sampled items
    d.candidate_sampling = "uniform"  # uniform | popularity (as popular as what users take, in expectation)
    d.candidate_exclude = "past"  # never listed, but as the target: past (all that the user had) | history (the window)
    d.template = "titles"  # a file of rosepo_jax/data/templates, or a path; {candidates} is filled from the frozen list
    d.world = ConfigDict(  # source = world: the embedded generative model of users and titles
        dict(users=2000, titles=300, genres=8, series=60, length=24, slate=12, exposure=0.5, noise=1.0, flip=0.0)
    )

    c.model = m = ConfigDict()
    m.path = ""  # a Hugging Face directory, or a hub id such as "Qwen/Qwen3-4B"; "" = a new model
    m.revision = ""  # of a hub id: branch, tag or commit; "" = main. The commit is recorded
    m.architecture = ""  # a file of rosepo_jax/models/architectures, or the path of a config.json: shape of a new
    # model, and what `rosepo doctor` counts while model.path is not on this machine; "" = the preset below
    m.vocabulary = 4096  # new model: size of the byte-level BPE trained on the titles of the training histories
    m.width = 128
    m.layers = 4
    m.heads = 4
    m.kv_heads = 2
    m.mlp_width = 384
    m.tie_embeddings = True
    m.prompt_length = 128  # P: longer prompts drop their oldest history items
    m.response_length = 32  # T: bound on a title's tokens, EOS included; a longer title is an error
    m.chat_template = False  # wrap the prompt in the tokenizer's chat template
    m.dtype = "float32"  # compute dtype: float32 | bfloat16 (log-probs and losses are float32 always)
    m.param_dtype = "float32"
    m.remat = "none"  # none | dots | full: what the backward pass computes again (models/decoder.REMAT)
    m.attention = "auto"  # of the prompt: auto | xla | cudnn (NVIDIA, bfloat16) | splash (TPU)
    m.logits_chunk = 0  # response tokens of a prompt whose vocabulary logits exist at a time; 0 = all
    m.tuning = "full"  # full | lora
    m.lora = ConfigDict(
        dict(
            rank=8,
            alpha=16.0,
            targets="attention/.*|mlp/.*",  # of attention/{query,key,value,output} and mlp/{gate,up,down}: a pattern
            dropout=0.0,  # of the adapters' inputs, in SFT only: in alignment policy and reference must agree
            rslora=False,  # scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)
        )
    )
    m.adapter = ""  # a PEFT directory that SFT starts from; its rank, alpha and targets replace those of model.lora
    m.quantize = "none"  # none | int8 | nf4: how the frozen base of LoRA is kept

    c.oracle = o = ConfigDict()
    o.width = 64
    o.layers = 2
    o.heads = 2
    o.dropout = 0.2  # to 1/256
    o.loss = "ce"  # ce (softmax over the whole catalogue) | bce (one sampled negative)
    o.positions = "all"  # all | last: which positions of a window are trained
    o.batch_size = 256
    o.learning_rate = 1e-3
    o.weight_decay = 0.0
    o.length = "10 epochs"
    o.patience = 3  # stop after this many epochs without a better validation NDCG@10

    c.sft = _training(learning_rate=1e-3, length="3 epochs", batch_size=64)
    c.sft.patience = 0  # stop after this many validations without a better HR@1; 0 = never (the best is kept anyhow)

    c.pairs = p = ConfigDict()
    p.path = ""  # ready-made rows (JSONL or Parquet: prompt, chosen, rejected[, epsilon]) instead of mined ones
    p.strategy = "self_hard"  # self_hard | semantic | popularity | uniform, or a mixture: "self_hard:0.5,uniform:0.5"
    p.negatives = 1  # rejected items of one prompt
    p.rows = "train"  # train | held_out: which rows pairs are built from
    p.max_rows = 0  # at most this many prompts, chosen by hash; 0 = all
    p.pool = "candidates"  # self_hard and uniform draw from: candidates (the row's frozen list) | catalogue (trie beam)
    p.beams = 20  # self_hard over the catalogue: beam width
    p.top = 50  # semantic: draw among the items nearest to the history ...
    p.temperature = 0.1  # ... by softmax(similarity / temperature)
    p.similarity = "max"  # max | mean cosine to the history items
    p.alpha = 1.0  # popularity: p(i) proportional to count(i)^alpha
    p.flip = 0.0  # experiment: share of prompts whose chosen and first rejected are exchanged
    p.batch_size = 64

    c.align = a = _training(learning_rate=1e-4, length="1 epochs", batch_size=32)
    a.keep = "last"  # HR@1 would choose early steps, before biases have changed
    a.objective = "rosepo"  # a name of preference/objectives.py
    a.beta = 0.1
    a.aggregator = "pairs"  # K > 1 rejected in dpo, rosepo, robust, ipo, hinge, simpo: pairs | lse | mean
    a.gamma_ratio = 0.25  # simpo: target margin over beta
    a.beta_prime = 1.0  # dr-dpo
    a.nll = 0.0  # weight of the negative log-likelihood of the chosen response (RPO)
    a.nll_reduction = "sequence"  # sum | sequence (mean over a response's tokens) | token (mean over all tokens)
    a.smoothing = ConfigDict(
        dict(
            mode="oracle",  # oracle | fixed | none | shuffled
            source="in_step",  # in_step (the oracle runs inside the step) | stored (read from the pairs)
            temperature=0.0,  # tau; 0 = the one fitted on validation
            cap=0.5,
            value=0.1,  # mode = fixed
        )
    )
    a.reference = "in_step"  # in_step | cached

    c.evaluate = e = ConfigDict()
    e.protocols = ("candidates", "catalogue", "generate")  # and windows, with data.windows
    e.batch_size = 64
    e.beams = 20
    e.budget = 2000  # prefixes that best-first search may expand for a row whose beams prove nothing; 0 = leave it
    e.top = 10  # items of a ranked list that are kept
    e.neighbours = 20  # semantic error: a wrong top-1 among this many items nearest to the history
    e.bootstrap = 2000  # resamples
    e.sft_more = True  # the control: SFT continued for alignment's steps on alignment's rows
    e.max_generate = 0  # rows of the generate protocol; 0 = all
    e.probe_rows = 500  # rows on which the probes are run (evaluation/probes.py); 0 = none
    e.published = ""  # a table of evaluation/published.json to stand beside the results

    c.mesh = ConfigDict(
        dict(
            **dict(replica=1, fsdp=-1, tensor=1),  # -1 = all devices that are left
            devices=0,  # devices that the run must find; 0 = whatever is there
            hardware="",  # h100 | h200 | v5e | v5p: whose memory `rosepo doctor` counts with; "" = the devices here
        )
    )
    c.checkpoint = ConfigDict(dict(every="10 %", keep=2))
    c.log = ConfigDict(
        dict(
            every=10,  # steps
            tensorboard=True,
            peak_flops=0.0,  # FLOP/s of a device, for mfu; 0 = of training/flops.PEAKS, and no mfu on others
            profile="",  # "steps:10-15": traces these updates of each training stage, for xprof, into its profile/
            compilation_cache="auto",  # folder that keeps compiled programs for later runs; "" = none; auto = the
            # user's own (~/.cache/rosepo_jax), none where a run has several processes
        )
    )
    return c


def variant(c: ConfigDict, arg: str) -> ConfigDict:
    """What `NAME.py:ARG` makes of `c`: "" leaves it, "smoke" shrinks it to a run of seconds that measures nothing."""
    if arg not in ("", "smoke"):
        raise UserError(f"unknown argument :{arg}; there is :smoke, or none")
    if not arg:
        return c
    c.mesh = default().mesh
    c.data.max_validation = c.data.max_test = 48
    c.data.world.users, c.data.world.titles, c.data.world.series = 200, 60, 15
    c.model.path, c.model.architecture, c.model.chat_template, c.model.vocabulary = "", "", False, 512
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 32, 2, 4, 2, 64
    c.model.prompt_length, c.model.response_length = 512, 128  # a small vocabulary needs many tokens a title
    c.oracle.width, c.oracle.length = 32, "20 steps"
    c.sft.batch_size, c.sft.accumulate, c.sft.length, c.sft.validate = 16, 1, "20 steps", "50 %"
    c.align.batch_size, c.align.accumulate, c.align.length, c.align.validate = 16, 1, "8 steps", "50 %"
    c.pairs.max_rows, c.pairs.batch_size = 64, 64
    c.evaluate.batch_size, c.evaluate.bootstrap, c.evaluate.budget = 64, 100, 40
    c.evaluate.max_generate, c.evaluate.probe_rows = 8, 16
    c.checkpoint.every = "25 %"
    c.log.every = 1
    return c


# Word of an argument -> device, how many, prompts that each holds at a time in training and in scoring.
MACHINES = {
    "h100-1": ("h100", 1, 16, 4),
    "h100-8": ("h100", 8, 8, 4),
    "h200-1": ("h200", 1, 16, 8),
    "h200-8": ("h200", 8, 16, 8),
    "v5e-16": ("v5e", 16, 2, 1),
    "v5p-64": ("v5p", 32, 4, 4),  # the name of the slice counts two cores a chip
}
# Word of an argument -> published rows: source, folder, template, T that fits the titles, and the published table.
PUBLISHED = {
    "movielens": ("llara", "data/llara-movielens", "movies", 32, "llara-movielens"),
    "lastfm": ("llara", "data/llara-lastfm", "music", 96, "llara-lastfm"),
    "sdpo": ("llara", "data/sdpo-lastfm", "sdpo_music", 96, "sdpo-lastfm"),
    "steam": ("llara", "data/llara-steam", "games", 96, "llara-steam"),
    "goodreads": ("sequences", "data/patchrec-goodreads", "books", 96, ""),
}


def published_rows(c: ConfigDict, rows: str) -> None:
    """Sets `c` to the rows of PUBLISHED, all of them, in their split, with candidates as their authors drew them."""
    c.data.source, c.data.path, c.data.template, c.model.response_length, c.evaluate.published = PUBLISHED[rows]
    c.data.split, c.data.candidate_exclude = "given", "history"
    c.data.core_user = c.data.core_item = 1


def small_on_llara(rows: str, arg: str) -> ConfigDict:
    """A small model from nothing on LLaRA's rows, for two CPU cores.

    `listed`: the prompt lists the candidates and the model answers freely too, LLaRA's protocol to the letter. Without
    it the prompt is the history alone, and the same lists are ranked. `smoke`: seconds, measures nothing.
    """
    words = set(filter(None, arg.split(",")))
    if not words <= {"listed", "smoke"}:
        raise UserError(f"unknown argument :{arg}; there are :listed and :smoke")
    c = default()
    published_rows(c, rows)
    c.data.windows, c.evaluate.protocols = True, ("candidates", "windows", "catalogue", "generate")
    c.data.held_out_share = 0.3
    c.model.vocabulary = 24576  # BPE stops where nearly every title is one token
    c.model.width, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp_width = 128, 2, 4, 2, 384
    c.sft.batch_size, c.sft.learning_rate, c.sft.length, c.sft.weight_decay = 128, 2e-3, "1000 steps", 0.1
    c.sft.validate = "250 steps"
    c.pairs.rows, c.pairs.negatives, c.pairs.strategy = "held_out", 8, "self_hard:0.3,uniform:0.7"
    c.align.batch_size, c.align.learning_rate, c.align.length, c.align.beta = 64, 2e-4, "200 steps", 0.5
    c.align.nll = 1.0  # without it the chosen titles lose probability, and validation HR@1 falls
    c.align.validate = "50 steps"
    if "listed" in words:
        c.data.template += "_candidates"
        c.evaluate.protocols = ("candidates", "windows", "generate")
    else:
        c.data.template = "titles"
    return variant(c, "smoke" if "smoke" in words else "")


def published_model(arg: str, *, path: str, architecture: str, data: str, full: str) -> ConfigDict:
    """A run with the published model `path`, by the words of `NAME.py:WORD,WORD`.

    full       trains all parameters (float32); without it, adapters on a frozen bfloat16 base
    MACHINES   what it runs on; default: one H100, or `full` for all parameters. Batches are the same on all of them:
               what does not fit at a time is accumulated
    PUBLISHED  the rows; default: `data`
    smoke      a tiny new model on the same rows, anywhere

    Learning rates are reconstructed: the usual ones for these sizes.
    """
    words = set(filter(None, arg.split(",")))
    kinds = ({"full"}, set(MACHINES), set(PUBLISHED), {"smoke"})
    if not words <= set().union(*kinds) or any(len(words & kind) > 1 for kind in kinds):
        choices = "; ".join(" | ".join(kind) for kind in (["full"], MACHINES, PUBLISHED))
        raise UserError(f"unknown argument :{arg}; there is :smoke, and at most one of each of: {choices}")
    everything = "full" in words
    (hardware,) = words & set(MACHINES) or {full if everything else "h100-1"}
    (rows,) = words & set(PUBLISHED) or {data}

    c = default()
    published_rows(c, rows)
    c.data.held_out_share, c.data.max_validation = 0.3, 500
    c.model.path, c.model.architecture, c.model.chat_template = path, architecture, True
    c.model.prompt_length, c.model.dtype, c.model.remat = 512, "bfloat16", "full"
    c.model.tuning, c.model.param_dtype = ("full", "float32") if everything else ("lora", "bfloat16")
    c.model.lora.rank, c.model.lora.alpha = 16, 32.0
    c.sft.batch_size, c.sft.length, c.sft.validate = 128, "5 epochs" if rows == "steam" else "1 epochs", "25 %"
    c.align.batch_size, c.align.length, c.align.validate = 64, "1 epochs", "25 %"
    c.sft.learning_rate, c.align.learning_rate = (1e-5, 1e-6) if everything else (1e-4, 1e-5)
    c.pairs.rows, c.pairs.negatives, c.pairs.strategy = "held_out", 3, "self_hard:0.3,uniform:0.7"
    c.pairs.max_rows = 16000
    c.evaluate.max_generate = 500

    device, devices, training, scoring = MACHINES[hardware]
    c.mesh.hardware, c.mesh.devices = device, devices
    if not everything and device != "v5e":  # every device holds the base: nothing is gathered
        c.mesh.replica, c.mesh.fsdp = -1, 1
    for section in (c.sft, c.align):
        section.accumulate = max(section.batch_size // (devices * training), 1)
    c.pairs.batch_size = c.evaluate.batch_size = devices * scoring
    return variant(c, "smoke" if "smoke" in words else "")


def beta_by_smoothing(betas: tuple[float, ...] = (0.1, 0.3, 1.0)) -> list[dict]:
    """A sweep: every beta with every kind of smoothing."""
    modes = ("oracle", "fixed", "none", "shuffled")
    return [{"align.beta": beta, "align.smoothing.mode": mode} for beta in betas for mode in modes]


def _training(*, learning_rate: float, length: str, batch_size: int) -> ConfigDict:
    """The keys that SFT and alignment share."""
    return ConfigDict(
        dict(
            batch_size=batch_size,  # prompts in one update, over all devices
            accumulate=1,  # micro-batches of one update
            length=length,
            learning_rate=learning_rate,
            schedule="cosine",  # cosine | linear | constant, after the warm-up
            warmup="5 %",
            weight_decay=0.0,
            clip=1.0,  # global gradient norm
            validate="10 %",  # interval of validation HR@1
            keep="best",  # best | last: hand on the parameters of the best validation HR@1, or the last ones
            spike=0.0,  # skip updates whose loss is so many standard deviations above its running mean; 0 = take all
            max_bad_steps=10,  # updates skipped (spikes, non-finite losses or gradients) before the run is aborted
        )
    )
