"""Every config key: its default, meaning, unit and source. Other configs change what differs.

    python -m experiments.train --config configs/base.py --workdir DIR --config.policy.path=DIR --config.data.name=NAME

Sections and numbers of the paper are those of arXiv 2602.04879.
"""

from ml_collections import ConfigDict, config_dict

from dppo_jax.losses import LOSSES, hyperparameters, words
from dppo_jax.models.config import MATRICES

INF = float("inf")
NO_TAG = r"(?:(?!</?(?:think|answer)>).)*+"
FORMAT = rf"\s*<think>{NO_TAG}</think>\s*<answer>{NO_TAG}</answer>\s*"  # one thought, then one answer
DPPO_TV = ("dppo_binary_tv", "dppo_topk_tv", "dppo_exact_tv", "dppo_binary_tv_proximal", "dppo_topk_tv_proximal")
DPPO_KL = ("dppo_binary_kl", "dppo_topk_kl", "dppo_exact_kl", "dppo_binary_kl_proximal", "dppo_topk_kl_proximal")


def data_section(**changes) -> ConfigDict:
    """Where prompts and answers come from; the training data and every evaluation set have these keys."""
    data = ConfigDict()
    data.kind = "reasoning_gym"  # reasoning_gym | jsonl | parquet | hub | environment (docs/conversation.md)
    data.name = ""  # reasoning_gym, environment: its name, or a FILE.py:CLASS; hub: ORG/NAME, a data set of the hub
    data.max_turns = 8  # environment: turns of the policy in a conversation, at most
    data.subset = ""  # hub: which of the data set's subsets; "": its only one, or its default
    data.split = "train"  # hub: which of the subset's splits
    data.revision = ""  # hub: a branch, a tag or a commit; "": the main branch
    data.commit = ""  # hub: what data.revision was when the run began, which the run itself writes here
    data.path = ""  # jsonl, parquet: a file, a folder of them, or a pattern; rows of a published shape (docs/data.md)
    data.columns = ConfigDict()  # of rows; a.b is b of a
    data.columns.prompt = ""  # the column that holds the prompt; "": recognised
    data.columns.answer = ""  # the column that holds the answer; "": recognised
    data.columns.verifier = ""  # the column that names a row's verifier; "": data.verifier scores all rows
    data.answer_from = ""  # what of it is the answer: "" recognised | #### (what follows) | boxed | regular expression
    data.bad_label = "error"  # a row whose label the verifier could never accept: error | drop
    data.settings = ConfigDict()  # reasoning_gym, environment: the data set's or the environment's own
    data.size = config_dict.placeholder(int)  # examples, at most; unset: all of a file, 2000 or 500 generated
    data.seed = 1  # reasoning_gym: generates the examples; environment: the first one's seed
    data.verifier = "task"  # task: the data set's own | exact_match | last_number | math_verify | none: every reply 0
    data.extract = "auto"  # what of a reply it reads: auto | answer_tag | boxed | hashes | last_number | whole
    data.chat = False  # wrap prompts by the tokenizer's chat template
    data.chat_kwargs = ConfigDict()  # further arguments of the template, such as Qwen3's enable_thinking
    data.template = "{prompt}"  # text around every prompt
    data.date = "2024-07-26"  # what a chat template takes for today (the default: what Llama 3's falls back on)
    data.max_prompt_len = 64  # tokens; prompts are padded on the left to this length
    data.too_long = "error"  # a longer prompt: error | skip
    data.settings.unlock()
    data.chat_kwargs.unlock()
    for key, value in changes.items():
        if key == "columns":
            data.columns.update(value)
        else:
            data[key] = value
    return data


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # the run is a function of (config, seed, data)
    c.steps = 100  # rollout batches

    c.policy = ConfigDict()
    c.policy.path = ""  # Hugging Face directory: config.json, *.safetensors, tokenizer; or a model on the hub, ORG/NAME
    c.policy.revision = ""  # of a model on the hub: a branch, a tag or a commit; "": the main branch
    c.policy.commit = ""  # what policy.revision was when the run began, which the run itself writes here
    c.policy.shape = ""  # a config.json, for --trace where policy.path is not on this machine
    c.policy.dtype = "float32"  # training forward pass: float32 | bfloat16 (§5); master weights are float32
    c.policy.matmul = "highest"  # float32 products: default (rounded on TPU and GPU) | high | highest
    c.policy.temperature = config_dict.placeholder(float)  # unset: rollout.temperature; unlike it: mismatch
    c.policy.remat = "dots"  # the backward pass recomputes: none | dots: all but matrix products | full: every layer
    c.policy.head_float32 = False  # the head's product in float32, here and in the rollout, at any dtype (ScaleRL)
    c.policy.head_pieces = 0  # the vocabulary passes through the head in so many; 0: as the memory asks. Memory only
    c.policy.attention = "auto"  # auto: by platform | xla | cudnn | splash

    c.lora = ConfigDict()  # adapters beside the policy's matrices, trained in their place (2106.09685)
    c.lora.rank = 0  # of an adapter; 0: none, all parameters are trained (32 in the paper's LoRA runs)
    c.lora.alpha = 64.0  # A B is multiplied by alpha / rank (the paper's; its learning rate is then 1e-5)
    c.lora.targets = MATRICES  # the matrices that have one; of every expert too

    c.data = data_section()

    c.rollout = ConfigDict()
    c.rollout.prompts = 16  # prompts per step (64 in §5, 256 or 128 in appendix E)
    c.rollout.group_size = 8  # responses per prompt, G (8 in §5, 16 or 8 in appendix E)
    c.rollout.max_new_tokens = 64  # response length, R
    c.rollout.stop = ()  # texts; a response ends where its text holds one of them, in training and evaluation
    c.rollout.turn_tokens = config_dict.placeholder(int)  # of one turn with an environment; unset: no limit of its own
    c.rollout.temperature = 1.0  # divides the logits, of training too unless policy.temperature is set (appendix E)
    c.rollout.top_p = 1.0  # truncation changes the behavior policy: training refuses anything but 1
    c.rollout.dtype = "float32"  # of the behavior policy: float32 | bfloat16 | float16; unlike policy.dtype: mismatch
    c.rollout.weights = ""  # mismatch: its matrices rounded to bfloat16 | float16 | float8 | int8 | int4 | m1 .. m23
    c.rollout.activations = ""  # mismatch: the inputs of its linear layers rounded, to the same formats
    c.rollout.quantize = ""  # "" | int8 | float8 (e4m3): the layers' matrices are held so, a scale an output channel
    c.rollout.quantize_activations = False  # their inputs too, a scale a token: products of narrow numbers
    c.rollout.exact = False  # tokens are drawn from the training pass itself, to the bit: no mismatch; on a CPU
    c.rollout.lag = 0  # mismatch: updates by which the behavior parameters are older than the policy's
    c.rollout.resample = 0  # at most so many more batches, until every group has unequal rewards (DAPO)
    c.rollout.slots = 0  # rows decoded at a time; a finished one makes room for the next; 0: all of them
    c.rollout.cache = "auto"  # of keys and values: auto: by platform and length | pages | blocks. Time and memory only
    c.rollout.pages = 0  # of 128 tokens, that a shard of the batch has beside its prompts'; 0: as the memory allows
    c.rollout.chunk = 256  # decode steps between which a run hears that it is asked to stop; 0: a rollout is one call
    c.rollout.in_flight = 0  # batches of prompts drawn ahead, whose responses may go on after an update; 0: none
    c.rollout.max_age = config_dict.placeholder(int)  # steps, of a token when it is trained; unset: rollout.in_flight
    c.rollout.router_replay = False  # a mixture's experts are recorded, and training goes through the same ones (R3)
    c.rollout.tracked = 20  # K: tracked tokens, recorded when the loss needs them (§4: 20)

    c.reward = ConfigDict()
    c.reward.workers = 2  # processes for verifiers that may hang (math_verify)
    c.reward.time_limit_s = 10.0  # seconds for one reply; then it is killed, counted, and scores 0
    c.reward.replies_per_worker = config_dict.placeholder(int)  # until a new one; unset: 500, of environments 20,000
    c.reward.function = ""  # FILE.py:FUNCTION of (reply, example), in the verifier's place, in workers; "": none
    c.reward.terms = ConfigDict()  # names of TERMS -> weights, at least 0: the reward is their sum
    c.reward.terms.correct = 1.0  # the score of the verifier, 0 or 1, or of reward.function
    c.reward.terms.format = 0.0  # 1 where the whole reply matches reward.format, else 0
    c.reward.terms.length = 1.0  # 0 down to -1 over reward.overlong_buffer
    c.reward.terms.repetition = 0.0  # minus the share of n-grams that repeat (Open-R1)
    c.reward.terms.model = 0.0  # the score of reward.model
    c.reward.overlong_buffer = 0  # tokens before rollout.max_new_tokens over which the reward falls by 1 (DAPO, eq. 13)
    c.reward.overlong_filter = False  # truncated responses take no part in the update (DAPO, 2503.14476, section 3.4)
    c.reward.format = FORMAT  # a regular expression, of the whole reply
    c.reward.ngram = 3  # words (Open-R1's repetition_n_grams)
    c.reward.model = ConfigDict()  # a sequence classifier of one label, which scores the prompt with the reply
    c.reward.model.path = ""  # Hugging Face directory, its tokenizer with a chat template; or a model on the hub
    c.reward.model.revision = ""  # of a model on the hub: a branch, a tag or a commit; "": the main branch
    c.reward.model.commit = ""  # what reward.model.revision was when the run began, which the run itself writes here
    c.reward.model.dtype = "float32"  # of its weights and its pass: float32 | bfloat16 | float16
    c.reward.model.max_len = 2048  # tokens of prompt and reply; what is longer is cut there, scored so, and counted
    c.reward.model.rows = 16  # conversations a batch, over all devices; time and memory only
    c.reward.kl_coef = 0.0  # the reward falls by so much times the KL from the run's first policy; 0: no pass of it
    c.reward.kl_estimator = "k1"  # of that KL, summed over a response's tokens: k1 | k2 | k3

    c.advantage = ConfigDict()
    c.advantage.name = "group_mean"  # a key of ADVANTAGES, or gae; §5: no standard deviation
    c.advantage.ddof = 0  # 1: n - 1 under the deviations of group_mean_std and batch_norm, as verl and TRL; 0: n
    c.advantage.drop_equal = False  # groups of equal rewards take no part in the update (ScaleRL, DAPO)

    c.critic = ConfigDict()  # used where advantage.name is gae: PPO with a critic
    c.critic.learning_rate = 1e-5
    c.critic.discount = 1.0
    c.critic.lam = 0.95  # lambda of generalised advantage estimation (PPO, 1707.06347, section 5)
    c.critic.lam_alpha = config_dict.placeholder(float)  # lambda = 1 - 1/(alpha L) by length L, >= 0; unset: critic.lam
    c.critic.bounds = ()  # least and greatest reward: every value is between them (BPCO: (0.0, 1.0)); (): linear head
    c.critic.targets = "gae"  # of its values: gae: advantage + value | monte_carlo: the discounted return (BPCO)
    c.critic.value_clip = 0.2  # the value's change that its loss sees; inf: all of it
    c.critic.whiten = True  # advantages of a batch have mean 0 and deviation 1
    c.critic.privileged = ""  # what it sees beside the prompt, and the policy never: answer, or a column; "": nothing
    c.critic.template = "{prompt}\n\nThe reference answer is: {privileged}."  # its prompt then, within data.template
    c.critic.max_prompt_len = 128  # tokens of that prompt; of a longer one as data.too_long says

    c.reference = ConfigDict()  # a penalty on the divergence from the policy that the run began with (GRPO)
    c.reference.coef = 0.0  # beta; 0: none, and no pass of it
    c.reference.estimator = "k3"  # k1 | k2 | k3

    c.teacher = ConfigDict()  # another model of the same tokens, which scores what the policy drew (loss distill)
    c.teacher.path = ""  # as policy.path; "": none
    c.teacher.revision = ""  # as policy.revision
    c.teacher.commit = ""  # as policy.commit
    c.teacher.dtype = "float32"  # of its parameters and its pass: float32 | bfloat16 | float16

    c.alp = ConfigDict()  # adaptive layerwise perturbation (2603.19470): noise on every layer's input, in training
    c.alp.sigma = 0.0  # its deviation at first, learned per layer; 0: none
    c.alp.learning_rate = 1e-3  # of log sigma, on optimizer.schedule

    c.loss = ConfigDict()
    c.loss.name = "dppo_binary_tv"  # a key of LOSSES
    texts = {name for loss in LOSSES.values() for name in words(loss)}
    for name in sorted({name for loss in LOSSES.values() for name in hyperparameters(loss)}):
        # unset: the value in loss_defaults.<loss.name>
        c.loss[name] = config_dict.placeholder(str if name in texts else float)

    # Used where loss.<name> is unset. From §7 and appendix E; configs/paper/sanity_test.py holds those of §5.
    # relax_* have no default alpha: §6 sweeps it.
    tv, kl = dict(delta_low=0.2, delta_high=0.2), dict(delta_low=0.05, delta_high=0.05)
    clip, higher = dict(eps_low=0.2, eps_high=0.2), dict(eps_low=0.2, eps_high=0.27)
    capped = dict(**clip, correction_cap=2.0)  # the two sources of TIS and MIS use 2
    c.loss_defaults = ConfigDict(
        {
            "reinforce": {},
            "pg_is": dict(ratio_cap=INF),
            "cispo": dict(ratio_cap=5.0),
            "ppo_clip": dict(**clip, ratio_cap=5.0),
            "clip_higher": dict(**higher, ratio_cap=5.0),
            "bypass": dict(**clip, ratio_cap=5.0),
            "dual_clip": dict(**clip, dual_cap=3.0, ratio_cap=INF),  # 1912.09729
            "ppo_clip_recomputed": dict(**clip, ratio_cap=INF),
            **{f"{level}_{kind}": capped for level in ("token", "sequence") for kind in ("tis", "mis")},
            "icepop": dict(**clip, correction_low=0.5, correction_high=5.0),  # 2510.18855
            "gspo": dict(eps_low=3e-4, eps_high=4e-4, ratio_cap=INF),  # 2507.18071, section 5.1
            "sapo": dict(tau_low=1.05, tau_high=1.0),  # 2511.20347
            "kimi_k25": dict(eps_low=0.5, eps_high=1.0, tau=1e-3),  # the report gives no numbers: ours
            "deepseek_v32": dict(**clip, delta_low=0.1, ratio_cap=INF),  # the report gives no delta: ours
            "trm_max": dict(delta=0.25, ratio_cap=5.0),  # ours
            "trm_mean": dict(delta=0.01, ratio_cap=5.0),  # ours
            "vaco": dict(delta=0.1, ratio_cap=5.0),  # ours
            "kpop": dict(delta=0.1, ratio_cap=5.0),
            "binary_tv_unsigned": dict(**tv, ratio_cap=5.0),
            "drpo": dict(delta=12.5, ratio_cap=INF),  # 2606.09821, section 4
            "cppo": dict(delta=0.2, delta_budget=0.02, w_min=0.8, ratio_cap=5.0),  # 2606.10968
            "geometric_mask": dict(eps_low=1e-3, eps_high=1e-3, ratio_cap=2.0),  # verl's preset
            "flash_reinforce": dict(delta=3e-3, ratio_cap=INF),  # 2607.21653 and its examples
            "vespo": dict(k_low=3.0, k_high=2.0, lambda_low=2.0, lambda_high=3.0),  # 2602.10693, section 4.1
            "gmpo": dict(eps_low=0.4, eps_high=0.4),  # 2507.20673; of log r
            "minpro": dict(eps_low=1.0, eps_high=4.0),  # ours: no lower bound, and the cap of cispo
            "m2po": dict(delta=0.04, ratio_cap=INF),  # 2510.01161
            "estr": dict(**clip, delta=1.0, entropy_floor=0.01, ratio_cap=INF),  # 2607.22186; delta is ours
            "minirl": dict(**higher, ratio_cap=INF),
            "minirl_tis": dict(**higher, ratio_cap=3.0),
            "minimal_mask": dict(delta_low=0.5, ratio_cap=5.0),  # §5.3
            **{f"relax_{side}": dict(**higher, ratio_cap=5.0) for side in ("low", "high", "both")},
            "dis": dict(eps_low=0.3, eps_high=5.0, ratio_cap=INF),  # 2607.07508, section 4.1, mathematics
            "ripo": dict(budget=0.05, ratio_low=0.5, ratio_high=10.0, ratio_cap=INF),  # 2607.10169
            "aspo": dict(**clip, ratio_cap=3.0),  # 2510.06062; it gives no cap: that of dual_clip
            "up": dict(eps_low=0.2, ratio_cap=INF),  # 2607.06987
            "prime_rl": dict(**tv, tau=1e-3),  # prime-rl's default loss, April to August 2026
            "distill": dict(delta_low=0.2, ratio_cap=INF),  # ours; delta as DPPO's
            **{name: dict(**tv, ratio_cap=5.0) for name in DPPO_TV},
            **{name: dict(**kl, ratio_cap=5.0) for name in DPPO_KL},
            # 2607.10848; the thresholds of the divergences that it shares with DPPO
            "pdm_topk_tv": dict(**tv, ratio_cap=5.0, tail="uniform"),
            "pdm_topk_kl": dict(**kl, ratio_cap=5.0, tail="uniform"),
            "pdm_exact_tv": dict(**tv, ratio_cap=5.0),
            "pdm_exact_kl": dict(**kl, ratio_cap=5.0),
        }
    )

    c.aggregation = ConfigDict()
    c.aggregation.name = "token_mean"  # a key of WEIGHTS
    c.aggregation.constant = 1.0  # tokens; the fixed denominator of seq_sum_const

    c.train = ConfigDict()
    c.train.minibatches = 4  # optimizer minibatches per rollout batch (4 in §5, 8 or 4 in appendix E)
    c.train.epochs = 1  # passes over a rollout batch
    c.train.pack = True  # several samples in a row, no padding between; False: one sample a row. Time only
    c.train.micro_rows = 4  # rows of prompt + response length per device that exist at one time; time and memory only
    c.train.max_skipped = 4  # updates, one after another, that are skipped since not finite: then training stops
    c.train.staleness = 0  # 1: the next batch is drawn before this one's updates, while the host scores; 0: after them

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6  # §5, appendix E
    c.optimizer.schedule = "constant"  # constant | linear | cosine, the last two down to 0 at the end
    c.optimizer.warmup = 0  # updates
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # global gradient norm; inf: never

    c.sft = ConfigDict()  # experiments.sft alone: supervised fine-tuning, on rows of data with completions
    c.sft.column = "completion"  # holds the completion; rows of messages may end with the assistant's turn instead
    c.sft.epochs = 1  # passes over the rows
    c.sft.batch = 32  # rows of an optimizer step
    c.sft.held_out = ""  # further rows, as data.path, whose loss is measured after every epoch; "": none

    c.eval = ConfigDict()
    c.eval.every = 0  # steps; 0: never
    c.eval.sets = ConfigDict()  # name -> data section
    c.eval.samples = 1  # responses per question (32 in appendix E)
    c.eval.prompts = 32  # questions per batch
    c.eval.max_new_tokens = config_dict.placeholder(int)  # response length; unset: rollout.max_new_tokens
    c.eval.temperature = 0.7  # appendix E; 0: greedy
    c.eval.top_p = 0.95  # appendix E

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 0  # steps; 0: only at the end
    c.checkpoint.every_s = 0.0  # seconds since the last one, after which a step is saved too; 0: never
    c.checkpoint.grace_s = 30.0  # seconds from SIGTERM until a machine goes; a stop that takes longer is told; 0: never
    c.checkpoint.keep = 2  # newest ones kept
    c.checkpoint.keep_every = 0  # steps that are multiples of it are kept as well; 0: none
    c.checkpoint.best = ""  # tag of the log, such as reward/mean: the step that is best by it is kept as well; "": none
    c.checkpoint.best_of = "max"  # max | min: whether the largest value of checkpoint.best is best, or the smallest
    c.checkpoint.export = False  # at the end: WORKDIR/policy, a Hugging Face model, and of LoRA WORKDIR/adapter (PEFT)
    c.checkpoint.export_dtype = ""  # float32 | bfloat16 | float16, of WORKDIR/policy; "": what policy.path is stored in

    c.log = ConfigDict()
    c.log.histograms = 10  # steps between histograms; 0: never
    c.log.samples = 10  # steps between sampled transcripts; 0: never
    c.log.events_mb = 100.0  # of TensorBoard's events, after which they go on in a further file; 0: never
    c.log.transcripts = 8  # transcripts shown
    c.log.regions = ()  # losses whose masks are measured beside the one that trains, with their loss_defaults
    c.log.tokens = 0  # steps between tables of the tokens most often masked; 0: never
    c.log.profile_step = -1  # the step of which WORKDIR/tb has a trace, for TensorBoard's Profile tab; -1: none
    c.log.stuck_s = 1800.0  # seconds in one phase of a step, after which the run ends with all stacks; 0: never
    c.log.wandb = ""  # a project of Weights & Biases that takes the log too (pip install wandb); "": none

    c.compile_cache = "~/.cache/dppo_jax"  # what was compiled is kept here for later runs; "": nowhere
    c.label_cache = "~/.cache/dppo_jax/labels"  # which labels math_verify can read is kept here; "": nowhere

    c.mesh = ConfigDict()  # sizes; their product is the number of devices; -1: what the others leave
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1
    c.mesh.expert = 1
    c.lock()
    c.eval.sets.unlock()
    c.data.settings.unlock()
    c.data.chat_kwargs.unlock()
    c.reward.terms.unlock()
    return c
