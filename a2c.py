# SPDX-License-Identifier: MIT
"""Advantage Actor-Critic (A2C): a few steps of many environments, then one step of the policy.

The policy gradient weights the log-probability of each action by its advantage: how much better the
action did than the critic V predicted. V also predicts the rewards that follow the few steps, so no
update waits for the end of an episode. Parallel environments make up for the short batch.

(1)  deltas = rewards + gamma * (1 - terminations) * V(next_obs) - V(obs)
     advantages[t] = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * advantages[t + 1]
(2)  returns = advantages + V(obs), where rewards, V and returns are in units of return_norm.std,
     the running standard deviation of all earlier returns
(3)  policy_loss = -E[log pi(actions | obs) * advantages]
(4)  loss = policy_loss + vf_coef * E[(V(obs) - returns)^2] - ent_coef * E[entropy(pi)]

    repeat
        collect num_steps transitions from each of num_envs environments with pi
        compute their advantages (1) and returns (2)
        take one RMSprop step on the loss (4)

A2C is the synchronous form of A3C, Mnih et al. 2016, arXiv:1602.01783. RMSprop adds epsilon outside
the square root. With gae_lambda = 1, (2) are the paper's n-step returns; a smaller one is GAE,
arXiv:1506.02438. Running normalization of observations and rewards and orthogonal initialization
are those of ppo.py, but V is not rescaled when return_norm.std changes. Processes of torchrun
average their gradients and take one step together. With --asynchronous they are the workers of A3C:
each changes the shared weights and waits for no other, see `share`. A time limit (truncation)
bootstraps from V(next_obs); only a termination does not.

    python a2c.py --env Acrobot-v1
    torchrun --nproc-per-node 4 a2c.py --env Acrobot-v1 --asynchronous --device cpu
"""
import argparse, collections, contextlib, csv, fnmatch, functools, io, json, math, os, pathlib
import random, re, signal, sys, time, traceback, typing
from dataclasses import dataclass, field, fields

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ============================================================================== Hyperparameters
def arg(default, help, low=-3e38, high=3e38):
    return field(default=default, metadata=dict(help=help, limits=[low, high]))


@dataclass(init=False)
class Args:
    # The run: the same in every script.
    env: str = arg("CartPole-v1", "environment id; module:Id imports the module first")
    total_timesteps: int = arg(1_000_000, "steps over all environments and processes", 1)
    num_envs: int = arg(8, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of networks, environments and sampling", 0, 2**53)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda if there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder of the run; empty: a new one in runs/, from Python none")
    checkpoint_every: int = arg(0, "steps between checkpoints; 0: one a minute", 0)
    # The algorithm.
    num_steps: int = arg(5, "steps of each environment in a batch", 1)
    learning_rate: float = arg(7e-4, "step size of RMSprop", 0)
    gamma: float = arg(0.99, "discount factor", 0, 1)
    gae_lambda: float = arg(1.0, "lambda of GAE (1)", 0, 1)
    anneal: bool = arg(True, "lower learning_rate linearly to 0")
    asynchronous: bool = arg(False, "A3C: the processes of torchrun do not wait (CPU only)")
    ent_coef: float = arg(0.0, "weight of the entropy bonus", 0)
    vf_coef: float = arg(0.5, "weight of the value loss", 0)
    max_grad_norm: float = arg(0.5, "gradients are clipped to this norm", 1e-8)
    hidden_size: int = arg(64, "units in each of the two hidden layers", 1)
    log_std: float = arg(0.0, "initial log standard deviation of actions scaled to [-1, 1]")
    norm_obs: bool = arg(True, "normalize vector observations by running statistics")
    norm_returns: bool = arg(True, "divide rewards by the running std of the returns")

    def __init__(self, **given):
        apply_settings(self, given)


GAE = dict(num_envs=16, num_steps=16, gae_lambda=0.95)
MUJOCO = GAE | dict(learning_rate=2e-3, log_std=-0.5)
PRESETS = {  # settings that are known to work; keys may be patterns
    "CartPole-v1": dict(total_timesteps=60_000, num_steps=16, learning_rate=3e-3, gae_lambda=0.95),
    "Acrobot-v1": GAE | dict(total_timesteps=300_000, learning_rate=3e-3),
    "Pendulum-v1": GAE | dict(learning_rate=1.5e-3, gamma=0.95, norm_obs=False),
    "HalfCheetah-v5": MUJOCO, "InvertedDoublePendulum-v5": MUJOCO,
    "*ALE/*": dict(total_timesteps=10_000_000, num_envs=16, ent_coef=0.01)}
ACTION_SPACES = "Discrete", "Box"


# ===================================================================================== Networks
class RunningNorm(nn.Module):
    """Normalizes (..., *shape) by the mean and standard deviation of all inputs of `update`."""

    def __init__(self, shape):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))
        self.sums = nn.Buffer(torch.zeros(3, *shape, dtype=torch.double))  # of x^0, x^1 and x^2

    @torch.no_grad()
    def update(self, x):
        """Add x (B, *shape) to the statistics, in double precision for means far from 0."""
        x = x.double()
        sums = torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        all_reduce_mean(sums)
        self.sums += sums
        mean, square = self.sums[1:] / self.sums[0]
        std = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1))  # less is rounding error

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)


class NatureCNN(nn.Sequential):
    """Features (..., 512) of images (..., C, H, W) of bytes, as in Mnih et al. 2015."""

    def __init__(self, shape):
        super().__init__(nn.Conv2d(shape[0], 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2),
                         nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
        self.extend([nn.Linear(self(torch.zeros(1, *shape)).shape[-1], 512), nn.ReLU()])

    def forward(self, images):
        features = super().forward(images.flatten(0, -4) / 255)
        return features.unflatten(0, images.shape[:-3])


def mlp(*sizes):
    layers = [layer for n, m in zip(sizes, sizes[1:]) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """The policy pi (actor) and the value function V (critic)."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = gym.spaces.flatdim(action_space)  # logits, or means
        if len(obs_space.shape) == 3:
            self.encoder, sizes = NatureCNN(obs_space.shape), [512]
        else:
            self.encoder = RunningNorm(obs_space.shape) if args.norm_obs else nn.Identity()
            sizes = [obs_space.shape[0], args.hidden_size, args.hidden_size]
        self.actor, self.critic = mlp(*sizes, outputs), mlp(*sizes, 1)
        for p in self.parameters():
            nn.init.orthogonal_(p, math.sqrt(2)) if p.dim() > 1 else nn.init.zeros_(p)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)  # at first, actions hardly depend on obs
        nn.init.orthogonal_(self.critic[-1].weight, 1)
        self.return_norm = RunningNorm(())
        if not self.discrete:  # outputs from -1 to 1 cover the bounds
            _, _, self.center, self.scale = map(nn.Buffer, box_bounds(action_space))
            self.log_std = nn.Parameter(self.scale.log() + args.log_std)

    def value(self, obs):
        return self.critic(self.encoder(obs)).squeeze(-1)

    def evaluate_actions(self, obs, actions):
        """log pi(actions | obs), the entropy of pi(. | obs) and V(obs), each of shape (...).

        The same as torch.distributions gives, in three quarters of the time."""
        features = self.encoder(obs)
        outputs, values = self.actor(features), self.critic(features).squeeze(-1)
        if self.discrete:
            log_pi = outputs.log_softmax(-1)
            log_probs = log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return log_probs, -(log_pi.exp() * log_pi).sum(-1), values
        z = (actions - self.center - self.scale * outputs) / self.log_std.exp()
        log_normalizer = self.log_std.sum() + len(self.log_std) / 2 * math.log(2 * math.pi)
        log_probs = -z.square().sum(-1) / 2 - log_normalizer
        return log_probs, (log_normalizer + len(self.log_std) / 2).expand_as(values), values

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """Sample actions (N,) or (N, action_dim) for obs (N, *shape), or take the most probable."""
        outputs = self.actor(self.encoder(obs))
        if self.discrete:
            if not deterministic:  # the argmax with Gumbel noise is a sample of the softmax
                outputs = outputs - torch.empty_like(outputs).exponential_().log()
            return outputs.argmax(-1)
        mean = self.center + self.scale * outputs
        return mean if deterministic else mean + self.log_std.exp() * torch.randn_like(mean)


# ==================================================================================== Algorithm
def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages (1) and returns (2); every tensor is (T, N)."""
    next_values = torch.where(terminations > 0, 0.0, next_values)  # not a product: 0 * NaN is NaN
    deltas = rewards + gamma * next_values - values
    decays = gamma * gae_lambda * (1 - dones)
    advantages, advantage = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(deltas.flip(0), decays.flip(0)):
        advantage = delta + decay * advantage
        advantages.append(advantage)
    advantages = torch.stack(advantages).flip(0)
    return advantages, advantages + values


def explained_variance(values, returns):
    """1 if V predicts every return, 0 if it does no better than a constant."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def share(agent, weights, optimizer, step):
    """A3C: let the processes share all that they learn; return (local_weights, steps).

    `weights`, RMSprop's `square_avg`, the sums of every RunningNorm and `steps`, the steps of each
    process, move to shared memory. The agent of each process keeps its own copy of the weights,
    local_weights. From now on each process repeats, without locks and without waiting:

         collect a batch with local_weights, compute grad, the clipped gradient of its loss (4)
    (5)  square_avg = 0.99 * square_avg + 0.01 * grad^2
    (6)  weights = weights - learning_rate * grad / (sqrt(square_avg) + 1e-5)
    (7)  local_weights = weights"""
    import tempfile
    if not optimizer.state:
        optimizer.step()  # creates square_avg; the weights do not move, as the gradient is 0
    local_weights, steps = weights.detach(), torch.zeros(WORLD_SIZE, dtype=torch.long)
    steps[0] = step
    sums = [module.sums for module in agent.modules() if isinstance(module, RunningNorm)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folders = [folder]
        if WORLD_SIZE > 1:
            torch.distributed.broadcast_object_list(folders)  # all take that of process 0
        for i, x in enumerate([weights, optimizer.state[weights]["square_avg"], steps, *sums]):
            shared = torch.from_file(f"{folders[0]}/{i}", True, x.numel(), dtype=x.dtype)
            if RANK == 0:
                shared.copy_(x.flatten())
            x.data = shared.view_as(x)  # the agent's parameters still view the old memory
        if WORLD_SIZE > 1:
            torch.distributed.barrier()  # now all have mapped the files, which can be deleted
            # From now on all_reduce_mean does nothing. A second `train` in this program would hang.
            torch.distributed.destroy_process_group()
    return local_weights, steps


def train(args, resume=""):
    """Train a new agent, or resume the run in the folder `resume`; return (agent, history)."""
    batch_size = args.num_envs * args.num_steps
    device = setup(args)
    if args.asynchronous and device.type != "cpu":
        raise UserError("asynchronous processes share CPU memory: pass --device cpu")
    envs = VecEnv(args.env, args.num_envs, device)
    agent = Agent(envs.obs_space, envs.action_space, args).to(device)
    weights = flatten_parameters(agent)
    # A tensor, because a CUDA graph would keep the value that a float had at its capture.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.RMSprop([weights], learning_rate, eps=1e-5,
                                    capturable=device.type == "cuda")
    run = Run(args, envs, resume, agent=agent, optimizer=optimizer)
    if args.asynchronous:
        local_weights, steps = share(agent, weights, optimizer, run.step)

    def update(obs, actions, next_obs, rewards, terminations, dones):
        """One RMSprop step on a batch (T, N, ...); return what is logged (4,)."""
        log_probs, entropy, values = agent.evaluate_actions(obs, actions)
        with torch.no_grad():  # advantages and returns are constants in (3) and (4)
            advantages, returns = compute_gae(
                rewards / agent.return_norm.std, values, agent.value(next_obs), terminations,
                dones, args.gamma, args.gae_lambda)                                     # (1), (2)
        policy_loss = -(log_probs * advantages).mean()                                      # (3)
        value_loss = F.mse_loss(values, returns)
        loss = policy_loss + args.vf_coef * value_loss                                      # (4)
        if args.ent_coef:  # at 0, its gradient need not be computed
            loss = loss - args.ent_coef * entropy.mean()
        weights.grad.zero_()  # zero_grad() would set it to None; each p.grad is a view of it
        loss.backward()
        all_reduce_mean(weights.grad)
        weights.grad.mul_((args.max_grad_norm / weights.grad.norm()).clamp(max=1))
        optimizer.step()                                                               # (5), (6)
        if args.asynchronous:
            local_weights.copy_(weights)                                                    # (7)
        if args.norm_returns:
            agent.return_norm.update((returns * agent.return_norm.std).flatten())
        if isinstance(agent.encoder, RunningNorm):
            agent.encoder.update(obs.flatten(0, 1))
        return torch.stack([policy_loss, value_loss, entropy.mean(),
                            explained_variance(values, returns)]).detach()

    act, update = (cuda_graph(f, device) for f in (agent.act, update))
    while run.step < args.total_timesteps:
        run.checkpoint()
        remaining = 1 - run.step / args.total_timesteps if args.anneal else 1
        optimizer.param_groups[0]["lr"].fill_(args.learning_rate * remaining)

        rollout = []
        for _ in range(args.num_steps):
            obs, actions = envs.obs, act(envs.obs)
            rollout.append((obs, actions, *envs.step(actions)))
        rollout = [torch.stack(x) for x in zip(*rollout)]  # each (T, N, ...)
        run.step += batch_size * WORLD_SIZE
        if args.asynchronous:
            steps[RANK] += batch_size
            run.step = int(steps.sum())

        policy_loss, value_loss, entropy, explained_var = update(*rollout)
        run.log(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy,
                explained_variance=explained_var)
    run.finish()
    return agent, run.history


# ===================================================================================== Plumbing
# The same text in all nine scripts: processes, environments, run folder and command line.

NAME = pathlib.Path(globals().get("__file__", "notebook.py")).stem
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes that torchrun started
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
OPENED = []  # environments and writers, for clean_up to close
CLEAR = "\033[K" * sys.stderr.isatty()  # erases the progress line, which the cursor is on


class UserError(ValueError):
    """A mistake that the user can correct: one line on the command line, exit code 2."""


def apply_settings(args, given):
    """Given settings beat the preset of the environment, which beats the defaults."""
    env = str(given.get("env", args.env))
    preset = next((PRESETS[key] for key in PRESETS if fnmatch.fnmatchcase(env, key)), {})
    if unknown := given.keys() - {f.name for f in fields(args)}:
        raise UserError(f"{NAME} has no setting {', '.join(unknown)}")
    for f in fields(args):
        value, kind = given.get(f.name, preset.get(f.name, f.default)), type(f.default)
        (low, high), choices = f.metadata["limits"], typing.get_args(f.type)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            new = os.fspath(value) if kind is str else kind(float(value))  # 1e5 is an int, too
            valid = new in choices if choices else kind is str or low <= new == float(value) <= high
            if valid:
                setattr(args, f.name, new)
                continue
        limits = f" >= {low:g}" * (low > -3e38) + f" and <= {high:g}" * (high < 3e38)
        wanted = " or ".join(choices) or kind.__name__ + limits
        raise UserError(f"{f.name} is {value}, but must be {wanted}")


def seed_everything(*key):
    """Seed all generators with a number made from the key; return it for the environments."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return seed


@contextlib.contextmanager
def clean_up():
    """On exit, close what was opened, and restore torch's threads and all random states."""
    opened, threads = len(OPENED), torch.get_num_threads()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
        torch.set_num_threads(threads)
        while len(OPENED) > opened:
            with contextlib.suppress(Exception):  # it must not cost the result
                OPENED.pop().close()


def setup(args):
    """Choose the device, join the other processes, and seed the networks alike in all of them."""
    gpus = torch.cuda.device_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # per process
    name = args.device.replace("auto", "cuda" if gpus else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, dtype=torch.double, device=device).item()  # mps has no double
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {name} cannot be used: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # graphs refuse the default stream
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    return device


def all_reduce_mean(tensor):
    """Average a tensor over the processes, in place."""
    if WORLD_SIZE > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= WORLD_SIZE


def flatten_parameters(module):
    """Make the parameters views of one vector: this saves a fifth of an update on the CPU."""
    parameters = list(module.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    vector.grad = torch.zeros_like(vector)
    nn.utils.vector_to_parameters(vector, parameters)
    for p, grad in zip(parameters, vector.grad.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return vector


def cuda_graph(function, device):
    """On one GPU, replay `function` (tensors to a tensor) as a CUDA graph per set of shapes."""
    if device.type != "cuda" or WORLD_SIZE > 1:
        return function
    calls, graphs = collections.Counter(), {}

    def replay(*inputs):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] += 1
        if calls[shapes] <= 3:  # warm-up; they are real calls, too
            return function(*inputs)
        if shapes not in graphs:
            graph, static_inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
                graphs[shapes] = graph, static_inputs, function(*static_inputs)
        graph, static_inputs, output = graphs[shapes]
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        graph.replay()
        return output.clone()

    return replay


def box_bounds(space):
    """Low, high, center and half-width of a flattened Box (size,).

    Where a bound is missing, the center is the allowed number nearest to 0, the half-width 1."""
    low, high = (torch.tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
    bounded = (high - low).isfinite() & (high > low)
    center = torch.where(bounded, (low + high) / 2, 0.0).clamp(low, high)
    return low, high, center, torch.where(bounded, (high - low) / 2, 1.0)


def make_env(env_id, wrappers=(), **kwargs):
    """One environment: Atari frames are preprocessed, observations that are no Box flattened."""
    env = gym.make(env_id, **kwargs, **dict(frameskip=1) if "ALE/" in env_id else {})
    OPENED.append(env)
    if "ALE/" in env_id:
        env = gym.wrappers.AtariPreprocessing(env)
        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
    for wrapper in wrappers:
        env = wrapper(env)
    if not isinstance(env.observation_space, gym.spaces.Box):
        env = gym.wrappers.FlattenObservation(env)
    return env


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    """gymnasium's in SAME_STEP mode, a quarter faster: it keeps no infos but `final_obs`."""

    def step(self, actions):
        results, final_obs = [], {}
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            obs, reward, termination, truncation, _ = env.step(action)
            if termination or truncation:
                final_obs[i] = np.array(obs)
                obs, _ = env.reset()
            results.append((obs, float(reward), bool(termination), bool(truncation)))
        obs, *columns = zip(*results)
        return obs, *map(np.array, columns), dict(final_obs=final_obs)


class VecEnv:
    """Parallel copies of an environment, as tensors (num_envs, ...) on `device`.

    Observations are vectors, or images of bytes (C, H, W). `obs` is the one to act on,
    `episode_starts` is 1 where it is the first of an episode, and `episodes` collects
    (environment, return, length) of the episodes that end."""

    def __init__(self, env_id, num_envs, device, wrappers=(), **kwargs):
        if atari := "ALE/" in env_id:
            import ale_py  # registers them
        if atari and not kwargs and not wrappers:  # in C++ threads
            self.envs = gym.make_vec(env_id, num_envs, "vector_entry_point", use_fire_reset=False,
                                     reward_clipping=False, autoreset_mode="SameStep")
        else:
            self.envs = SyncVectorEnv([lambda: make_env(env_id, wrappers, **kwargs)] * num_envs,
                                      autoreset_mode="SameStep")
        OPENED.append(self.envs)
        space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        self.id, self.device, self.shape, self.episodes = env_id, device, space.shape, []
        kind = type(self.action_space).__name__
        if not isinstance(space, gym.spaces.Box):
            raise UserError(f"{env_id} observes {space}, which has no fixed size")
        if kind not in ACTION_SPACES or kind == "Box" and self.action_space.dtype.kind != "f":
            raise UserError(f"{NAME} takes {' and '.join(ACTION_SPACES)} actions, {env_id} has "
                            f"{self.action_space}; ppo takes Discrete and float Box actions")
        # NatureCNN needs images of 36 x 36 or more; smaller ones become vectors.
        self.image = space.dtype == np.uint8 and len(self.shape) == 3 and sorted(self.shape)[1] > 35
        low, high = (self.to_array(x[None])[0] for x in (space.low, space.high))
        self.obs_space = gym.spaces.Box(low, high, dtype=low.dtype)

    def to_array(self, obs):
        """Check the shape of observations; return vectors (N, size) or images (N, C, H, W)."""
        if wrong := {np.shape(x) for x in obs} - {self.shape}:
            raise UserError(f"{self.id} observes shape {self.shape}, but gave {wrong}")
        if not self.image:
            return np.array(obs, np.float32).reshape(len(obs), -1)
        array = np.array(obs, np.uint8)
        return array if self.shape[0] < self.shape[2] else np.moveaxis(array, 3, 1).copy()

    def to_tensor(self, array, checked=slice(None)):
        if not np.isfinite(array[checked]).all():
            wrong = array[~np.isfinite(array)]
            raise UserError(f"{self.id} gave observations or rewards that are not finite: {wrong}")
        return torch.from_numpy(array).to(self.device)

    def reset(self, seed):
        """Begin an episode everywhere; environment i gets seed + i, or seed[i] of a list."""
        self.obs = self.to_tensor(self.to_array(self.envs.reset(seed=seed)[0]))
        self.episode_starts = torch.ones(len(self.obs), device=self.device)
        self.returns, self.lengths = np.zeros((2, len(self.obs)))  # of the episodes so far

    def step(self, actions):
        """Act in all environments; return next_obs, rewards, terminations and dones.

        next_obs is the true successor, also where an episode ends and `obs` is of the next one."""
        actions, space = actions.cpu().numpy(), self.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = actions + space.start
        elif not np.isfinite(actions).all():
            raise FloatingPointError("the agent's actions are not finite")
        else:
            actions = actions.reshape(-1, *space.shape).clip(space.low, space.high)
        obs, rewards, terminations, truncations, infos = self.envs.step(
            actions.astype(space.dtype, copy=False))
        array, dones = self.to_array(obs), terminations | truncations
        self.obs = next_obs = self.to_tensor(array)
        self.returns += rewards
        self.lengths += 1
        if ended := dones.nonzero()[0].tolist():
            array = array.copy()
            for i in ended:
                array[i] = self.to_array([infos["final_obs"][i]])
                self.episodes.append((i, float(self.returns[i]), float(self.lengths[i])))
                self.returns[i] = self.lengths[i] = 0
            next_obs = self.to_tensor(array, ~terminations)  # what follows those does not count
        rewards, terminations, self.episode_starts = self.to_tensor(
            np.array([rewards, terminations, dones], np.float32)).unbind()
        return next_obs, rewards, terminations, self.episode_starts


def load_checkpoint(folder, device="cpu", **modules):
    """Read a run's checkpoint, which can hold no code, and load the states of these modules."""
    path = pathlib.Path(folder, "checkpoint.pt")
    try:
        saved = torch.load(path, device, weights_only=True)
        Args(**saved["args"])  # refuses those of another script
        for name, module in modules.items():
            if isinstance(module, torch.optim.Optimizer):  # its settings are those of args
                saved[name]["param_groups"] = module.state_dict()["param_groups"]
            module.load_state_dict(saved[name])
    except Exception as error:
        raise UserError(f"cannot load {path}: {type(error).__name__}: {error}") from error
    return saved


class Run:
    """A training run: its step, metrics and folder, and checkpoints of the modules' states."""

    stop_signal = 0  # the last signal that asked to stop

    def __init__(self, args, envs, resume, **modules):
        self.args, self.envs, self.modules, self.writer = args, envs, modules, None
        saved = load_checkpoint(resume, envs.device, **modules) if resume else dict(
            args=vars(args), step=0, history=[], recent=[], seconds=0)
        self.step, self.history, self.recent = saved["step"], saved["history"], saved["recent"]
        self.start_time, self.next_save = time.time() - saved["seconds"], 0
        # The last batch may end beyond total_timesteps; such a run can still be resumed.
        if args.total_timesteps < min(self.step, saved["args"]["total_timesteps"]):
            raise UserError(f"{resume} is at step {self.step:,}, beyond {args.total_timesteps:,}")
        self.folder = pathlib.Path(args.run_dir) if args.run_dir and RANK == 0 else None
        if self.folder:
            exists = os.path.exists(self.folder / "checkpoint.pt")
            if exists and not (resume and self.folder.samefile(resume)):
                raise UserError(f"{self.folder} holds a run; --resume {self.folder} continues it")
            self.write("args.json", lambda path: path.write_text(json.dumps(vars(args), indent=2)))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
                OPENED.append(self.writer)
        if RANK == 0:
            print(f"{NAME} on {envs.device}:", {name: value for name, value in vars(args).items()
                                                if value != getattr(Args, name)}, flush=True)
        # A resumed run starts new episodes; its random numbers depend only on seed, step and rank.
        envs.reset(seed_everything(args.seed, self.step, RANK))

    def write(self, name, save):
        """Call save(path) for a temporary file, then rename it: a kill cannot leave half of it."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # a RuntimeError of torch.save hides the cause
            hint = "; is the disk full?" * isinstance(error, RuntimeError)
            raise UserError(f"cannot write {path}: {error}{hint}") from error

    def checkpoint(self):
        """Call once per iteration: save if a checkpoint is due, stop if a signal asked for it."""
        stop = torch.tensor(float(Run.stop_signal), device=self.envs.device)
        all_reduce_mean(stop)  # all processes stop as soon as one is asked to
        if stop:
            self.finish()
            if self.folder:
                print(f"{CLEAR}stopped; --resume {self.folder} continues", file=sys.stderr)
            raise SystemExit(128 + (Run.stop_signal or signal.SIGTERM))
        if (self.step if self.args.checkpoint_every else time.time()) >= self.next_save:
            self.save()

    def save(self):
        every = self.args.checkpoint_every
        self.next_save = self.step + every if every else time.time() + 60
        state = {name: module.state_dict() for name, module in self.modules.items()}
        if not all(value.isfinite().all() for value in state["agent"].values()):
            raise FloatingPointError(f"the agent's weights are not finite at step {self.step:,}")
        if self.folder:
            state |= dict(args=vars(self.args), step=self.step, history=self.history,
                          recent=self.recent, seconds=time.time() - self.start_time)
            self.write("checkpoint.pt", lambda path: torch.save(state, path))

    def log(self, **metrics):
        """At most 200 times a run, add a row of metrics to the history and print the progress."""
        self.recent = (self.recent + self.envs.episodes)[-20:]
        self.envs.episodes.clear()
        last, total = self.history[-1]["step"] if self.history else 0, self.args.total_timesteps
        if self.step * 200 // total == last * 200 // total:
            return
        _, score, length = np.mean(self.recent or [[math.nan] * 3], 0).tolist()
        metrics = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"not finite at step {self.step:,}: {metrics}")
        self.history.append(row := dict(step=self.step, seconds=time.time() - self.start_time,
                                        episode_return=score, episode_length=length) | metrics)
        if self.folder:
            columns = dict.fromkeys(name for row in self.history for name in row)
            table = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
            table.writeheader(), table.writerows(self.history)
            self.write("metrics.csv", lambda path: path.write_text(text.getvalue()))
        for name, value in row.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)
        if RANK == 0:
            speed = self.step / row["seconds"]
            score = f"return {score:.1f}" if self.recent else "no episode has ended yet"
            line = (f"step {self.step:,} of {total:,} ({self.step / total:.0%}): {score}, "
                    f"{speed:,.0f} steps/s, {max(0, total - self.step) / speed:.0f} s left")
            in_place = sys.stdout.isatty() and self.step < total  # the last line stays
            print(line, end="\033[K\r" if in_place else "\n", flush=True)

    def finish(self):
        """Save, and draw the learning curve."""
        self.save()
        if not self.folder:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return print("learning_curve.png needs matplotlib", file=sys.stderr)
        axes = Figure((7, 4), dpi=150, layout="constrained").subplots()
        axes.plot(*zip(*((row["step"], row["episode_return"]) for row in self.history)))
        axes.set(title=f"{NAME} on {self.args.env}, seed {self.args.seed}",
                 xlabel="environment steps", ylabel="return, mean of 20 episodes")
        self.write("learning_curve.png", lambda path: axes.figure.savefig(path, format="png"))


@clean_up()
def load_agent(run, **changes):
    """The agent of the run folder `run`, and its Args with these changes: agent, args."""
    args = Args(**load_checkpoint(run)["args"] | changes)
    envs = VecEnv(args.env, 1, setup(args))
    agent = Agent(envs.obs_space, envs.action_space, args).to(envs.device)
    load_checkpoint(run, envs.device, agent=agent)
    return agent, args


@clean_up()
def evaluate(agent, args, episodes=100, **kwargs):
    """The returns (episodes,) of the deterministic policy on fresh episodes; kwargs: of gym.make.

    Each environment plays equally many, so that short episodes do not count more often."""
    torch.set_num_threads(args.threads)
    returns, next_print = [[] for _ in range(min(episodes, 20))], time.time() + 60
    envs = VecEnv(args.env, len(returns), next(agent.parameters()).device, **kwargs)
    envs.reset(seed_everything(args.seed, 0, 0, 1))  # the 1: other episodes than in training
    while (done := min(map(len, returns)) * len(returns)) < episodes:
        if hasattr(agent, "reset"):  # a planner forgets its plans where an episode starts
            agent.reset(envs.episode_starts)
        envs.step(agent.act(envs.obs, deterministic=True))
        for i, episode_return, _ in envs.episodes:
            returns[i].append(episode_return)
        envs.episodes.clear()
        if time.time() > next_print:
            print(f"evaluation: {done} of {episodes} episodes", flush=True)
            next_print = time.time() + 60
        if Run.stop_signal:
            raise SystemExit(128 + Run.stop_signal)
    return np.array(list(zip(*returns))).flatten()[:episodes]


def parse_args():
    """The command line: what to do, and the settings that are given."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--env ENV] [...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{NAME}.py: {message}\n")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", metavar="RUN", type=pathlib.Path, help="resume a run")
    group.add_argument("--evaluate", metavar="RUN", type=pathlib.Path, help="score a run's agent")
    parser.add_argument("--episodes", help="episodes to score (100)", default=100, type=int)
    parser.add_argument("--video", help="film an episode", action="store_true")
    parser.add_argument("--render", help="show an episode", action="store_true")
    for f in fields(Args):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else {}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} ({f.default})", **kind)
    options = parser.parse_args()
    given = {f.name: getattr(options, f.name) for f in fields(Args) if f.name in options}
    for name in given:
        if options.resume and name == "run_dir" or options.evaluate and name not in (
                "env", "seed", "device", "threads"):
            parser.error(f"{name} has no effect here")
    if options.episodes < 1:
        parser.error("episodes is at least 1")
    return options, given


def main():
    def request_stop(number, frame):
        Run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one kills

    sys.path += {os.getcwd()} - set(sys.path)  # where the module of module:Env-v0 may be
    np.seterr(over="ignore")  # what overflows becomes inf, which VecEnv refuses
    options, given = parse_args()
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    try:
        folder = options.resume or options.evaluate  # a Path, which is true even if it is empty
        if folder:
            given = load_checkpoint(folder)["args"] | given | dict(run_dir=folder)
        args, trained = Args(**given), ""
        if options.evaluate:
            agent, _ = load_agent(folder, **given)
        else:
            args.run_dir = args.run_dir or "runs/{}__{}__{}__{}".format(
                re.sub("[:/]", "-", args.env), NAME, args.seed, time.time_ns() // 10**6)
            agent, history = train(args, folder)
            step, seconds = history[-1]["step"], history[-1]["seconds"]
            trained = f", {step:,} steps in {seconds:.1f} s, {step / seconds:,.0f} steps/s"
        if WORLD_SIZE > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if RANK == 0:
            returns = evaluate(agent, args, options.episodes)
            print(f"{args.env}: return {returns.mean():.1f} +/- {returns.std():.1f} over "
                  f"{len(returns)} episodes{trained}; {args.run_dir}", flush=True)
            if options.video:
                film = functools.partial(gym.wrappers.RecordVideo, episode_trigger=lambda i: i == 0,
                                         video_folder=f"{args.run_dir}/videos")
                evaluate(agent, args, 1, wrappers=[film], render_mode="rgb_array")
            if options.render:
                evaluate(agent, args, 1, render_mode="human")
    except (UserError, FloatingPointError, ImportError, gym.error.Error, BrokenPipeError) as error:
        print(f"{CLEAR}{NAME}.py:", " ".join(str(error).split())[:500], file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except Exception as error:  # a bug here or in the environment: show where
        hint = "; without a display MuJoCo needs MUJOCO_GL=egl" * (options.video or options.render)
        print(f"{CLEAR}{NAME}.py failed on {args.env}: {error}{hint}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(2)


train = clean_up()(train)  # here, as a decorator above would need the plumbing to come first

if __name__ == "__main__":
    main()
