# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization (PPO): many small steps on each batch, which end near its policy.

The policy gradient may use a batch only once, since each step changes the policy that the batch
came from. PPO uses it for several epochs: it weighs every action by the ratio of its probabilities
under the new and the old policy, and clips the ratio so that moving it far from 1 gains nothing.

(1)  deltas = rewards + gamma * (1 - terminations) * V(next_obs) - V(obs)
     advantages[t] = deltas[t] + gamma * gae_lambda * (1 - dones[t]) * advantages[t + 1]
(2)  returns = advantages + V(obs), where rewards, V and returns are in units of return_norm.std
(3)  ratio = pi(actions | obs) / pi_old(actions | obs)
(4)  policy_loss = -E[min(ratio * advantages, clip(ratio, 1 -+ clip_coef) * advantages)]
(5)  loss = policy_loss + vf_coef * E[(V(obs) - returns)^2] - ent_coef * E[entropy(pi)]

    repeat
        collect num_steps transitions from each of num_envs environments with pi
        estimate their advantages (1) and returns (2)
        for each of update_epochs epochs, for each of num_minibatches random parts of the batch
            take one Adam step down the gradient of the loss (5)

Schulman et al. 2017, arXiv:1707.06347; (1) is GAE, arXiv:1506.02438. What else matters in practice,
like orthogonal initialisation and normalisation, of each minibatch's advantages too, is weighed in
arXiv:2005.12729 and arXiv:2006.05990. Where most versions let a time limit end an episode like any
other end, here the value of the state that was cut off stands in for the rest. Example:
--env HalfCheetah-v5
"""
import argparse, collections, contextlib, fnmatch, functools, gc, json, math, os, pathlib
import random, re, signal, sys, time, traceback, typing
from dataclasses import asdict, dataclass, field, fields

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ============================================================================== Hyperparameters
def arg(default, help, low=-3e38, high=3e38):
    return field(default=default, metadata=dict(help=help, limits=[low, high]))


@dataclass
class Args:
    # The run: the same in every script.
    env: str = arg("CartPole-v1", "environment id; module:Id imports the module first")
    total_timesteps: int = arg(1_000_000, "steps over all environments and processes", 1)
    num_envs: int = arg(8, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of the networks, the environments and every draw", 0)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder to write; empty is a new one in runs/, or none from Python")
    checkpoint_every: int = arg(0, "steps between checkpoints, each a reset; 0 is a tenth or so", 0)
    # The algorithm.
    num_steps: int = arg(256, "steps of each environment in a batch", 1)
    num_minibatches: int = arg(32, "parts that an epoch splits the batch into", 1)
    update_epochs: int = arg(10, "passes over each batch", 1)
    learning_rate: float = arg(3e-4, "Adam's step size", 0)
    gamma: float = arg(0.99, "discount factor", 0, 1)
    gae_lambda: float = arg(0.95, "lambda of (1): 0 trusts V, 1 trusts the rewards", 0, 1)
    recompute_advantages: bool = arg(False, "estimate (1) and (2) anew before every epoch")
    norm_advantages: bool = arg(True, "give each minibatch's advantages mean 0 and deviation 1")
    clip_coef: float = arg(0.2, "how far from 1 the ratio is worth moving", 0)
    anneal: bool = arg(True, "lower learning_rate and clip_coef linearly to 0")
    clip_values: bool = arg(False, "clip the change of V by clip_coef too")
    ent_coef: float = arg(0.0, "weight of the entropy bonus", 0)
    vf_coef: float = arg(0.5, "weight of the value loss", 0)
    max_grad_norm: float = arg(0.5, "longer gradients are scaled down to this norm", 0)
    target_kl: float = arg(0.0, "leave a batch when KL(old || new) exceeds this; 0 is never", 0)
    hidden_size: int = arg(64, "units in each of the two hidden layers", 1)
    log_std: float = arg(0.0, "log of actions' first deviation, relative to half their range")
    norm_obs: bool = arg(True, "standardise vector observations by running statistics")
    norm_returns: bool = arg(True, "divide rewards by the running deviation of the returns")

    def __init__(self, **given):
        settle(self, given)  # what is given beats the preset, which beats the default


MUJOCO = dict(vf_coef=0.25, recompute_advantages=True)
PRESETS = {  # what is known to work (for ALE, in the literature); keys may be patterns
    "CartPole-v1": dict(total_timesteps=50_000, num_steps=64, num_minibatches=4,
                        learning_rate=1e-3, norm_obs=False),
    "Acrobot-v1": dict(total_timesteps=300_000, num_envs=4, num_minibatches=16, learning_rate=6e-4),
    "Pendulum-v1": dict(total_timesteps=100_000, gamma=0.95, learning_rate=1e-3, norm_obs=False,
                        recompute_advantages=True),
    "LunarLander-v3": dict(num_envs=16, num_minibatches=64, gamma=0.999, gae_lambda=0.98,
                           ent_coef=0.01),
    "MountainCar-v0": dict(num_envs=16, num_steps=128, num_minibatches=16, update_epochs=4,
                           learning_rate=1e-3, gae_lambda=0.98),
    "HalfCheetah-v5": MUJOCO | dict(log_std=-0.5), "Hopper-v5": MUJOCO,
    "*ALE/*": dict(total_timesteps=10_000_000, num_steps=128, num_minibatches=4, update_epochs=4,
                   learning_rate=2.5e-4, clip_coef=0.1, ent_coef=0.01)}
ACTION_SPACES = "Discrete", "Box"


# ===================================================================================== Networks
class RunningNorm(nn.Module):
    """Standardises (..., *shape) by the mean and deviation of all that `update` was given."""

    def __init__(self, shape):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))
        self.sums = nn.Buffer(torch.zeros(3, *shape, dtype=torch.double))  # of x^0, x^1 and x^2

    @torch.no_grad()
    def update(self, x):
        """Take in x (B, *shape); in double precision, for the sake of means far from 0."""
        x = x.double()
        sums = torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        average(sums)
        self.sums += sums
        mean, square = self.sums[1:] / self.sums[0]
        std = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1))  # less is rounding

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)


class NatureCNN(nn.Sequential):
    """Images (..., C, H, W) of bytes to features (..., 512), as in Mnih et al. 2015."""

    def __init__(self, shape):
        super().__init__(nn.Conv2d(shape[0], 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2),
                         nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
        self.extend([nn.Linear(self(torch.zeros(1, *shape)).shape[-1], 512), nn.ReLU()])

    def forward(self, images):
        features = super().forward(images.flatten(0, -4) / 255)
        return features.unflatten(0, images.shape[:-3])


class MLP(nn.Sequential):
    def __init__(self, *sizes):
        layers = [layer for n, m in zip(sizes, sizes[1:]) for layer in (nn.Linear(n, m), nn.Tanh())]
        super().__init__(*layers[:-1])

    def forward(self, x):
        for layer in self:
            x = layer.forward(x)  # layer(x) would look for hooks, of which there are none
        return x


class Agent(nn.Module):
    """The policy pi and its value V: an actor and a critic that see the same features."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = gym.spaces.flatdim(action_space)  # one per action, or per part of one
        if len(obs_space.shape) == 3:
            self.encoder, sizes = NatureCNN(obs_space.shape), [512]
        else:
            self.encoder = RunningNorm(obs_space.shape) if args.norm_obs else nn.Identity()
            sizes = [obs_space.shape[0], args.hidden_size, args.hidden_size]
        self.actor, self.critic = MLP(*sizes, outputs), MLP(*sizes, 1)
        for x in self.parameters():
            nn.init.orthogonal_(x, math.sqrt(2)) if x.dim() > 1 else nn.init.zeros_(x)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)  # at first all actions are alike
        nn.init.orthogonal_(self.critic[-1].weight, 1)
        self.return_norm = RunningNorm(())
        if not self.discrete:  # the actor's [-1, 1] is stretched over finite bounds
            _, _, self.center, self.scale = map(nn.Buffer, bounds(action_space))
            self.log_std = nn.Parameter(self.scale.log() + args.log_std)

    def value(self, obs):
        return self.critic(self.encoder(obs)).squeeze(-1)

    def evaluate(self, obs, actions):
        """log pi(actions | obs), entropy of pi(. | obs) and V(obs): (...) for obs (..., *shape)."""
        features = self.encoder(obs)
        outputs, values = self.actor(features), self.critic(features).squeeze(-1)
        if self.discrete:
            log_pi = outputs.log_softmax(-1)
            log_probs = log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return log_probs, -(log_pi.exp() * log_pi).sum(-1), values
        deviations = (actions - self.center - self.scale * outputs) / self.log_std.exp()
        log_volume = self.log_std.sum() + len(self.log_std) / 2 * math.log(2 * math.pi)
        log_probs = -deviations.square().sum(-1) / 2 - log_volume
        return log_probs, (log_volume + len(self.log_std) / 2).expand_as(values), values

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """Draw actions (N,) or (N, action_dim) for obs (N, *shape), or take the most likely."""
        outputs = self.actor(self.encoder(obs))
        if self.discrete:
            if not deterministic:  # with Gumbel noise the argmax is a draw from the softmax
                outputs = outputs - torch.empty_like(outputs).exponential_().log()
            return outputs.argmax(-1)
        mean = self.center + self.scale * outputs
        return mean if deterministic else mean + self.log_std.exp() * torch.randn_like(mean)


# ==================================================================================== Algorithm
def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages (1) and returns (2); everything is (T, N).

    After a termination nothing follows; the sum over time stops where an episode does."""
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    decays = gamma * gae_lambda * (1 - dones)
    advantages, advantage = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(deltas.flip(0), decays.flip(0)):
        advantage = delta + decay * advantage
        advantages.append(advantage)
    advantages = torch.stack(advantages).flip(0)
    return advantages, advantages + values


def clipped_surrogate(ratio, advantages, clip_coef):
    """The policy loss (4). Clipping binds only where it lowers the gain, at A + clip_coef * |A|."""
    return -torch.min(ratio * advantages, advantages + clip_coef * advantages.abs()).mean()


def explained_variance(values, returns):
    """1 where V foretells every return, 0 where a constant would do as well."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def train(args, resume=""):
    """Train, from the start or on from the run folder `resume`; return agent and history."""
    if args.num_minibatches > args.num_envs * args.num_steps:
        raise UserError(f"{args.num_minibatches} minibatches are more than a batch has steps")
    device = setup(args)
    envs = Envs(args.env, args.num_envs, device)
    agent = Agent(envs.obs_space, envs.action_space, args).to(device)
    weights = flatten(agent)
    learning_rate, clip_coef = torch.tensor([args.learning_rate, args.clip_coef], device=device)
    optimizer = torch.optim.Adam([weights], learning_rate, eps=1e-5, fused=True,
                                 capturable=device.type == "cuda")
    run = Run(args, envs, resume, agent=agent, optimizer=optimizer)

    @torch.no_grad()
    def estimate(obs, actions, next_obs, rewards, terminations, dones):
        """Log-probabilities, entropy, V, advantages and returns of a batch, stacked (5, T, N)."""
        log_probs, entropy, values = agent.evaluate(obs, actions)
        return torch.stack([log_probs, entropy, values, *compute_gae(
            rewards / agent.return_norm.std, values, agent.value(next_obs), terminations, dones,
            args.gamma, args.gae_lambda)])

    def update(obs, actions, old_log_probs, old_values, advantages, returns):
        """Take one Adam step on a minibatch (B, ...); return its KL divergence and losses."""
        log_probs, entropy, values = agent.evaluate(obs, actions)
        log_ratio = log_probs - old_log_probs
        ratio = log_ratio.exp()                                                             # (3)
        if args.norm_advantages:  # a lone advantage becomes 0, not NaN
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        policy_loss = clipped_surrogate(ratio, advantages, clip_coef)                       # (4)
        value_loss = F.mse_loss(values, returns)
        if args.clip_values:
            near = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
            value_loss = torch.max((values - returns).square(), (near - returns).square()).mean()
        loss = policy_loss + args.vf_coef * value_loss                                      # (5)
        if args.ent_coef:
            loss = loss - args.ent_coef * entropy.mean()
        weights.grad.zero_()
        loss.backward()
        average(weights.grad)
        weights.grad.mul_((args.max_grad_norm / weights.grad.norm()).clamp(max=1))
        optimizer.step()
        kl = (log_ratio.expm1() - log_ratio).detach().mean()  # estimates KL(old || new)
        average(kl)
        return torch.stack([kl, policy_loss, value_loss]).detach()

    act, estimate, update = (capture(f, device) for f in (agent.act, estimate, update))
    while run.step < args.total_timesteps:
        run.checkpoint()
        remaining = 1 - run.step / args.total_timesteps if args.anneal else 1
        optimizer.param_groups[0]["lr"].fill_(args.learning_rate * remaining)
        clip_coef.fill_(args.clip_coef * remaining)

        rollout = []
        for _ in range(args.num_steps):
            obs, actions = envs.obs, act(envs.obs)
            rollout.append((obs, actions, *envs.step(actions)))
        obs, actions, *_ = rollout = [torch.stack(x) for x in zip(*rollout)]  # each (T, N, ...)
        run.step += args.num_steps * args.num_envs * WORLD_SIZE

        old_log_probs, entropy, values, advantages, returns = estimate(*rollout)
        fit = explained_variance(values, returns)  # before V learns from these returns
        statistics = []
        for epoch in range(args.update_epochs):
            if epoch and args.recompute_advantages:
                values, advantages, returns = estimate(*rollout)[2:]
            batch = obs, actions, old_log_probs, values, advantages, returns
            order = torch.randperm(args.num_steps * args.num_envs, device=device)
            parts = (x.flatten(0, 1)[order].tensor_split(args.num_minibatches) for x in batch)
            for minibatch in zip(*parts):
                if args.target_kl and statistics and statistics[-1][0] > args.target_kl:
                    break
                statistics.append(update(*minibatch))
        if args.norm_returns:
            agent.return_norm.update((returns * agent.return_norm.std).flatten())
        if isinstance(agent.encoder, RunningNorm):  # only now: ratios compare like with like
            agent.encoder.update(obs.flatten(0, 1))

        kl, policy_loss, value_loss = torch.stack(statistics).mean(0)
        run.log(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy.mean(), kl=kl,
                explained_variance=fit)
    run.finish()
    return agent, run.history


# ===================================================================================== Plumbing
# The same text in all nine scripts: processes, environments, run folder and command line.

NAME = pathlib.Path(__file__).stem
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0  # a stray one must not silence it
SCRIPTS = {"Discrete": "reinforce, a2c, ppo, trpo, dqn, cem_es, mbrl_mpc",
           "Box": "reinforce, a2c, ppo, trpo, ddpg, naf, cem_es, mbrl_mpc"}


class UserError(ValueError):
    """Something the user can put right: one line on the command line, exit code 2."""


@dataclass
class blame:
    """Tell any exception of a `with` block as a UserError about `what`.

    A class, since contextlib's generators would cost every step some time."""
    what: str

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, (Exception, SystemExit)):  # a module may exit when it is imported
            at = traceback.extract_tb(trace)[-1]
            why = " ".join(f"{kind.__name__}: {error}".split())[:300]
            place = f"{os.path.basename(at.filename)}:{at.lineno}"
            raise UserError(f"{self.what}: {why} ({place})") from error


def preset(env):
    return next((PRESETS[key] for key in PRESETS if fnmatch.fnmatchcase(str(env), key)), {})


def settle(args, given):
    """Fill in args: the defaults, over them the environment's preset, over that what is given.

    Refuse settings that do not exist, are of a wrong type or are outside their limits."""
    known = {f.name: f for f in fields(args)}
    defaults = {name: f.default for name, f in known.items()}
    for name, wanted in (defaults | preset(given.get("env", args.env)) | given).items():
        if name not in known:
            raise UserError(f"there is no setting {name}")
        with blame(f"{name} cannot be {wanted!r}"):
            kind = type(known[name].default)
            vars(args)[name] = value = kind(wanted)  # numpy's numbers would spoil a checkpoint
            if wanted is None or value != wanted and str(value) != str(wanted):
                raise TypeError(f"it is no {kind.__name__}")
        (low, high), choices = known[name].metadata["limits"], typing.get_args(known[name].type)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise UserError(f"{name} is {value}, which is not between {low} and {high}")
        if choices and value not in choices:
            raise UserError(f"{name} is {value}, which is none of {', '.join(choices)}")


def seed_all(*key):
    """Seed every generator with a number drawn from the key; return it for the environments."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return seed


def setup(args):
    """Take the device, join the other processes, and seed the networks alike in all of them."""
    name = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    with blame(f"device {name} cannot be used"):
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, dtype=torch.double, device=device).item()  # Apple's mps has none
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # warm-up must not use the default stream
    torch.set_num_threads(args.threads)
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    seed_all(0, args.seed)
    return device


def flatten(module):
    """Make all parameters views of one vector, and their gradients views of the vector's.

    Optimisers, which treat all weights alike, then take one call: a fifth of an update is saved."""
    parameters = list(module.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    vector.grad = torch.zeros_like(vector)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, vector.split(sizes), vector.grad.split(sizes)):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return vector


def average(*tensors):
    """Average tensors over the processes, in place; alone, do nothing."""
    for tensor in tensors if WORLD_SIZE > 1 else ():
        torch.distributed.all_reduce(tensor)
        tensor /= WORLD_SIZE


def capture(function, device):
    """On a GPU, replay `function` (tensors to a tensor) as one CUDA graph per set of shapes.

    Three calls warm up, the fourth is recorded, and all count. Elsewhere, and where there are
    several processes, `function` itself."""
    if device.type != "cuda" or WORLD_SIZE > 1:
        return function
    calls, graphs = collections.Counter(), {}

    def replay(*inputs):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] += 1
        if calls[shapes] <= 3:
            return function(*inputs)
        if shapes not in graphs:
            graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph):
                graphs[shapes] = graph, held, function(*held)
        graph, held, output = graphs[shapes]
        for mine, given in zip(held, inputs):
            mine.copy_(given)
        graph.replay()
        return output.clone()

    return replay


def prepare(env):
    """Byte images channels first, every other observation as a flat vector."""
    space = env.observation_space
    if space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36:
        if space.shape[0] > space.shape[2]:
            box = gym.spaces.Box(0, 255, (space.shape[2], *space.shape[:2]), np.uint8)
            env = gym.wrappers.TransformObservation(env, lambda x: np.moveaxis(x, 2, 0), box)
    elif not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def bounds(space):
    """Low and high of a Box, its center and half its width (size,), or 0 and 1 where unbounded."""
    low, high = (torch.tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
    bounded = (high - low).isfinite() & (high > low)
    center = torch.where(bounded, (low + high) / 2, 0.0)
    return low, high, center, torch.where(bounded, (high - low) / 2, 1.0)


class Serial(gym.vector.SyncVectorEnv):
    """gymnasium's, that begins an episode within the step that ended one.

    Its steps gather no infos but `final_obs`, where the episode ended; that halves their time."""

    def step(self, actions):
        results, final_obs = [], {}
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            obs, reward, termination, truncation, _ = env.step(action)
            if termination or truncation:
                final_obs[i] = np.array(obs)
                obs, _ = env.reset()
            results.append((obs, float(reward), bool(termination), bool(truncation)))
        return *map(np.array, zip(*results)), dict(final_obs=final_obs)


class Envs:
    """Copies of an environment, stepped in turn; every tensor is (num_envs, ...) on `device`.

    `obs` is what to act on, `begins` is 1 where it begins an episode; `episodes` gathers
    (environment, return, length) of those that end."""

    def __init__(self, env_id, num_envs, device, wrappers=(), **kwargs):
        sys.path += {os.getcwd()} - set(sys.path)  # where the module of module:Id may be
        with blame(f"cannot make {env_id}"):
            if atari := "ALE/" in env_id:  # ale_py:ALE/Pong-v5 too
                gym.register_envs(__import__("ale_py"))
            if atari and not kwargs and not wrappers:
                envs = gym.make_vec(env_id, num_envs, "vector_entry_point", reward_clipping=False,
                                    use_fire_reset=False, autoreset_mode="SameStep")
            else:  # the fast version of Atari can neither be filmed nor wrapped
                def make():
                    env = gym.make(env_id, **kwargs, **dict(frameskip=1) if atari else {})
                    if atari:
                        env = gym.wrappers.AtariPreprocessing(env)
                        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
                    for wrapper in wrappers:
                        env = wrapper(env)
                    return prepare(env)

                envs = Serial([make] * num_envs, autoreset_mode="SameStep")
            self.obs_space = envs.single_observation_space
            self.dtype = np.uint8 if len(self.obs_space.shape) == 3 else np.float32
        self.id, self.device, self.envs, self.episodes = env_id, device, envs, []
        self.action_space = envs.single_action_space
        kind = type(self.action_space).__name__
        if kind == "Box" and self.action_space.dtype.kind != "f":
            kind = "integer Box"
        if kind not in ACTION_SPACES:
            raise UserError(f"{env_id} has {kind} actions, which {NAME} does not take; "
                            f"these scripts do: {SCRIPTS.get(kind, 'none')}")

    def tensor(self, array, dtype=np.float32):
        return torch.from_numpy(np.array(array, dtype)).to(self.device)

    def reset(self, seed):
        """Begin an episode everywhere, in environment i with seed + i or, of a list, seed[i]."""
        with blame(f"{self.id} failed to reset"):
            self.obs = self.tensor(self.envs.reset(seed=seed)[0], self.dtype)
        self.begins = torch.ones(len(self.obs), device=self.device)
        self.returns, self.lengths = np.zeros((2, len(self.obs)))  # of the episodes that go on

    def step(self, actions):
        """Act; return next_obs, rewards, terminations and dones.

        next_obs is where the actions led, also where an episode ended and `obs` begins the next."""
        actions, space = actions.cpu().numpy(), self.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = actions + space.start
        else:
            if not math.isfinite(actions.sum()):
                raise FloatingPointError("the agent's actions are not finite")
            actions = actions.reshape(-1, *space.shape).clip(space.low, space.high)
            actions = actions.astype(space.dtype, copy=False)
        with blame(f"{self.id} failed"):
            obs, rewards, terminations, truncations, infos = self.envs.step(actions)
            self.obs = next_obs = self.tensor(obs, self.dtype).view_as(self.obs)
            dones = terminations | truncations
            ended = dones.nonzero()[0].tolist()
            if ended:
                obs = np.array(obs, self.dtype)  # a first observation may be of whole numbers
                for i in ended:
                    obs[i] = infos["final_obs"][i]
                next_obs = self.tensor(obs, self.dtype).view_as(self.obs)
        self.returns += rewards
        self.lengths += 1
        if not math.isfinite(sum(self.returns.tolist())):  # faster than numpy's
            raise UserError(f"{self.id} gave the rewards {rewards.tolist()}")
        for i in ended:
            self.episodes.append((i, float(self.returns[i]), float(self.lengths[i])))
            self.returns[i] = self.lengths[i] = 0
        rewards, terminations, self.begins = self.tensor([rewards, terminations, dones]).unbind()
        return next_obs, rewards, terminations, self.begins


def load(folder, device="cpu"):
    """The checkpoint of the run in `folder`."""
    with blame(f"{folder} holds no checkpoint that can be read"):
        saved = torch.load(pathlib.Path(folder, "checkpoint.pt"), device, weights_only=True)
        script = saved["script"]
    if script != NAME:
        raise UserError(f"{folder} is a run of {script}.py, not of {NAME}.py")
    return saved


class Run:
    """A training run: its progress, its folder, and checkpoints from which it goes on exactly.

    The trainer counts `step`. `state` are the objects whose state_dict a checkpoint keeps."""

    signal = 0  # the last that asked to stop

    def __init__(self, args, envs, resume, **state):
        self.args, self.envs, self.state, self.board = args, envs, state, None
        saved = dict(step=0, history=[], recent=[], seconds=0)
        if resume:
            saved = load(resume, envs.device)
            with blame(f"{resume} does not fit these settings"):
                for name in state:
                    for group in saved[name].get("param_groups", ()):  # saved on whichever device
                        group["capturable"] = envs.device.type == "cuda"
                    state[name].load_state_dict(saved[name])
        self.step, self.due, self.history = saved["step"], saved["step"], saved["history"]
        self.recent = collections.deque(saved["recent"], maxlen=20)  # the latest of envs.episodes
        self.began, self.said = time.time() - saved["seconds"], saved["seconds"]
        self.folder = pathlib.Path(args.run_dir) if args.run_dir and RANK == 0 else None
        if self.folder:
            if not resume and os.path.exists(self.folder / "checkpoint.pt"):
                raise UserError(f"{self.folder} holds a run; --resume goes on with it")
            text = json.dumps(asdict(args), indent=2)
            self.write("args.json", lambda path: path.write_text(text))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder, purge_step=self.step)
        if RANK == 0:
            chosen = [f"{name}={value}" + "*" * (preset(args.env).get(name) == value)
                      for name, value in asdict(args).items() if value != getattr(Args, name)]
            print(f"{NAME}: {args.env} on {envs.device} (* from the preset):", *chosen, flush=True)
        # What exists by now stays; searching it for garbage slowed rollouts by 10 %.
        gc.unfreeze(), gc.collect(), gc.freeze()

    @classmethod
    def ask_to_stop(cls, number, frame):
        cls.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one does not ask

    def checkpoint(self):
        """Where one is due: save, seed everything from the step, and begin new episodes.

        What follows depends on the checkpoint alone, so a resumed run repeats an unbroken one."""
        stop = Run.signal
        if WORLD_SIZE > 1:  # all stop as soon as one is asked to
            average(stop := torch.tensor(float(stop), device=self.envs.device))
        if stop:
            self.finish()
            if self.folder:
                print(f"stopped; --resume {self.folder} goes on from here", file=sys.stderr)
            raise SystemExit(128 + (Run.signal or signal.SIGTERM))
        if due := self.step >= self.due:
            self.save()
            every = self.args.checkpoint_every or max(  # leave episodes the time to end
                self.args.total_timesteps // 10, 2000 * self.args.num_envs * WORLD_SIZE)
            self.due = (self.step // every + 1) * every
            self.envs.reset(seed_all(1, self.args.seed, self.step, RANK))
        return due

    def save(self):
        for name, value in self.state["agent"].state_dict().items():
            if not value.isfinite().all():
                raise FloatingPointError(f"the agent's {name} is not finite at step {self.step:,}")
        saved = dict(script=NAME, args=asdict(self.args), step=self.step, history=self.history,
                     recent=list(self.recent), seconds=time.time() - self.began)
        saved |= {name: module.state_dict() for name, module in self.state.items()}
        self.write("checkpoint.pt", lambda path: torch.save(saved, path))

    def write(self, name, write):
        """Write beside the file, then rename: neither a kill nor a full disk can break it."""
        if self.folder:
            with blame(f"cannot write {self.folder / name}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                write(self.folder / f"{name}.part")
                os.replace(self.folder / f"{name}.part", self.folder / name)

    def progress(self, always=False):
        """Take in the finished episodes and, every two seconds, say where the run is."""
        self.recent += self.envs.episodes
        self.envs.episodes.clear()
        seconds = time.time() - self.began
        if RANK == 0 and (always or seconds > self.said + 2):
            speed, self.said = self.step / seconds, seconds
            left = max(0, self.args.total_timesteps - self.step) / max(speed, 1e-8)
            print(f"step {self.step:,} of {self.args.total_timesteps:,}: "
                  f"return {self.mean_episode()[1]:.1f}, {speed:,.0f} steps/s, {left:.0f} s left"
                  + ", stopping" * bool(Run.signal), flush=True)

    def mean_episode(self):
        return np.mean(self.recent or [[math.nan] * 3], 0).tolist()

    def log(self, **metrics):
        """Keep at most 200 rows of metrics a run: in history, metrics.csv and TensorBoard."""
        self.progress()
        last, total = self.history[-1]["step"] if self.history else 0, self.args.total_timesteps
        if self.step * 200 // total == last * 200 // total:
            return
        row = dict(step=self.step, seconds=time.time() - self.began)
        _, row["episode_return"], row["episode_length"] = self.mean_episode()
        for name, value in metrics.items():
            row[name] = float(value)
            if not math.isfinite(row[name]):
                raise FloatingPointError(f"{name} is {row[name]} at step {self.step:,}")
        self.history.append(row)
        rows = [",".join(map(str, x)) for x in (row, *(x.values() for x in self.history))]
        self.write("metrics.csv", lambda path: path.write_text("\n".join(rows) + "\n"))
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, self.step)

    def finish(self):
        """Save what there is and draw the learning curve."""
        self.progress(always=True)
        self.save()
        if not self.folder:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("learning_curve.png needs matplotlib", file=sys.stderr)
            return
        axes = Figure((7, 4), dpi=150, layout="constrained").subplots()
        axes.plot(*zip(*((row["step"], row["episode_return"]) for row in self.history)))
        axes.set(title=f"{NAME} on {self.args.env}, seed {self.args.seed}",
                 xlabel="environment steps", ylabel="return, mean of 20 episodes")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        self.write("learning_curve.png", lambda path: axes.figure.savefig(path, format="png"))


def evaluate(agent, args, episodes=100, **kwargs):
    """The returns (episodes,) of the deterministic policy on fresh episodes.

    In each round every environment counts once, so that short episodes do not count more often."""
    num_envs, returns = min(episodes, 20), []
    envs = Envs(args.env, num_envs, next(agent.parameters()).device, **kwargs)
    while len(returns) < episodes:
        envs.reset(seed_all(2, args.seed, len(returns)))
        envs.episodes, first, steps = [], {}, 0
        while len(first) < num_envs:
            if hasattr(agent, "begin"):  # a planner forgets its plans where an episode begins
                agent.begin(envs.begins)
            envs.step(agent.act(envs.obs, deterministic=True))
            first, steps = {i: r for i, r, _ in reversed(envs.episodes)}, steps + 1
            if Run.signal:
                raise SystemExit(128 + Run.signal)
            if steps == 100_000:
                raise UserError(f"{args.env} goes on for {steps:,} steps and cannot be scored; it "
                                "needs a time limit, max_episode_steps where it is registered")
        returns += [first[i] for i in range(num_envs)]
    envs.envs.close()
    return np.array(returns[:episodes])


def main():
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    old = parser.add_mutually_exclusive_group()  # normpath makes '.' of '', which is no run either
    old.add_argument("--resume", metavar="RUN", type=os.path.normpath, help="go on with this run")
    old.add_argument("--evaluate", metavar="RUN", type=os.path.normpath, help="score its agent")
    parser.add_argument("--episodes", type=int, default=100, help="how many to score (100)")
    parser.add_argument("--video", action="store_true", default=False, help="film the first one")
    parser.add_argument("--render", action="store_true", default=False, help="show the first one")
    for f in fields(Args):
        kind = str if typing.get_args(f.type) else f.type
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=kind)
        help = f"{f.metadata['help']} ({f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=help, **kind)
    codes = {UserError: 2, FloatingPointError: 1, BrokenPipeError: 141}
    parser.error = lambda message: parser.exit(2, f"{NAME}.py: {message}\n")
    given = vars(parser.parse_args())
    episodes, video, render = (given.pop(name) for name in ("episodes", "video", "render"))
    if episodes < 1:
        parser.error(f"episodes is {episodes}, which is not at least 1")
    resume, score = given.pop("resume", ""), given.pop("evaluate", "")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Run.ask_to_stop)
    try:
        saved = load(resume or score) if resume or score else dict(args={})
        args = Args(**saved["args"] | given)
        args.run_dir = resume or score or args.run_dir or "runs/{}__{}__{}__{}-{}".format(
            re.sub("[:/]", "-", args.env), NAME, args.seed, time.strftime("%y%m%d-%H%M%S"),
            os.getpid())
        if score:
            envs, history = Envs(args.env, 1, setup(args)), saved["history"] or [saved]
            agent = Agent(envs.obs_space, envs.action_space, args).to(envs.device)
            with blame(f"{score} does not fit these settings"):
                agent.load_state_dict(saved["agent"])
        else:
            del saved  # the buffer of a resumed run would stay in memory twice
            agent, history = train(args, resume)
        if WORLD_SIZE > 1:
            torch.distributed.barrier()  # which would not wait as long as a score may take
        if RANK == 0:
            returns = evaluate(agent, args, episodes)
            step, seconds = history[-1]["step"], history[-1]["seconds"]
            print(f"{args.env}: return {returns.mean():.1f} ± {returns.std():.1f} over {episodes} "
                  f"episodes, {step:,} steps in {seconds:.1f} s, {step / seconds:,.0f} steps/s; "
                  f"{args.run_dir}")
            if video:
                film = functools.partial(gym.wrappers.RecordVideo, episode_trigger=lambda i: i == 0,
                                         video_folder=f"{args.run_dir}/videos")
                evaluate(agent, args, 1, wrappers=[film], render_mode="rgb_array")
            if render:
                evaluate(agent, args, 1, render_mode="human")
        if WORLD_SIZE > 1:  # at an ordinary exit gloo's threads now and then abort the process
            sys.stdout.flush(), os._exit(0)
    except tuple(codes) as error:
        parser.exit(codes[type(error)], f"{NAME}.py: {error}\n")


if __name__ == "__main__":
    main()
