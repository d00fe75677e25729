# SPDX-License-Identifier: MIT
"""Normalized Advantage Functions (NAF): a Q whose best action can be read off.

Q-learning needs the action that maximises Q, which nobody can look up where actions are continuous.
NAF gives Q a form that tells: at each observation a quadratic in the action, whose maximum V is at
mu. It learns from a buffer of old transitions, towards a slowly moving copy of itself.

(1)  td_target = rewards + gamma * (1 - terminations) * target_V(next_obs)
(2)  loss = E[(Q(obs, actions) - td_target)^2] + E[max(0, |u(obs)| - 2)^2] with mu = tanh(u)
(3)  Q(obs, actions) = V(obs) - (actions - mu(obs))^T P(obs) (actions - mu(obs)) / 2
     P(obs) = L(obs) L(obs)^T with a lower triangular L, whose diagonal is 1 + an exponential
(4)  target_weights = target_weights + tau * (weights - target_weights)
(5)  noise = (1 - theta) * noise + sigma * N(0, 1), with theta = 1 for Gaussian noise

    repeat
        take train_every steps with the actions mu(obs) + noise (5) into the buffer
        num_updates times, with batch_size random transitions of the buffer
            take one Adam step down the gradient of the loss (2)
            let the target follow (4)

Gu et al. 2016, arXiv:1603.00748, without its imagined rollouts. As in most later work there is no
batch normalisation, the first actions are uniform, and gradients are clipped. In (2), (3) and (5)
actions are as if bounded by -1 and 1. While V is still far off, fitting it drives mu to some bound,
where neither tanh nor a P that vanishes would let it go: so the diagonal of L exceeds 1, and (2)
holds u back. And where a time limit cuts an episode off, the value of its last state stands in for
the rest. Example: --env Pendulum-v1
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
    env: str = arg("Pendulum-v1", "environment id; module:Id imports the module first")
    total_timesteps: int = arg(1_000_000, "steps over all environments and processes", 1)
    num_envs: int = arg(1, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of the networks, the environments and every draw", 0)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder to write; empty is a new one in runs/, or none from Python")
    checkpoint_every: int = arg(0, "steps between checkpoints, each a reset; 0 is a tenth or so", 0)
    # The algorithm.
    buffer_size: int = arg(1_000_000, "transitions that the replay buffer holds", 1)
    batch_size: int = arg(256, "transitions of an update", 1)
    learning_starts: int = arg(10_000, "steps of random actions before learning", 0)
    train_every: int = arg(1, "steps of each environment between rounds of updates", 1)
    num_updates: int = arg(1, "updates in a round", 1)
    learning_rate: float = arg(1e-3, "Adam's step size", 0)
    gamma: float = arg(0.99, "discount factor", 0, 1)
    tau: float = arg(0.005, "how far the target moves to the network at each update", 0, 1)
    max_grad_norm: float = arg(1.0, "longer gradients are scaled down to this norm", 0)
    noise: typing.Literal["gaussian", "ou"] = arg("gaussian", "gaussian or ou (5)")
    sigma: float = arg(0.3, "deviation of the noise's draws, relative to half the bounds' range", 0)
    theta: float = arg(0.15, "how fast ou noise returns to 0", 0, 1)
    hidden_size: int = arg(256, "units in each of the two hidden layers", 1)

    def __init__(self, **given):
        settle(self, given)  # what is given beats the preset, which beats the default


PRESETS = {  # what is known to work; keys may be patterns
    "Pendulum-v1": dict(total_timesteps=20_000, learning_starts=500, batch_size=128, gamma=0.98,
                        hidden_size=128),
    "InvertedPendulum-v5": dict(total_timesteps=100_000, learning_starts=1000, batch_size=64,
                                hidden_size=64),
    "Reacher-v5": dict(total_timesteps=100_000, learning_starts=1000, batch_size=128,
                       hidden_size=128),
    "HalfCheetah-v5": dict(learning_starts=5000, batch_size=128)}
ACTION_SPACES = "Box",


# ===================================================================================== Networks
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
        layers = [layer for n, m in zip(sizes, sizes[1:])
                  for layer in (nn.Linear(n, m), nn.ReLU(inplace=True))]
        super().__init__(*layers[:-1])

    def forward(self, x):
        for layer in self:
            x = layer.forward(x)  # layer(x) would look for hooks, of which there are none
        return x


class Agent(nn.Module):
    """The quadratic Q: its maximum V, the policy mu, where that is, and L, how steep Q is."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.low, self.high, self.center, self.scale = map(nn.Buffer, bounds(action_space))
        if not ((self.high - self.low).isfinite() & (self.high > self.low)).all():
            raise UserError(f"{args.env} has actions without finite bounds or room between, which "
                            f"{NAME} does not take; these scripts do: reinforce, a2c, ppo, trpo, "
                            "cem_es, mbrl_mpc")
        if len(obs_space.shape) == 3:
            self.encoder, size = NatureCNN(obs_space.shape), 512
        else:
            self.encoder, size = nn.Identity(), obs_space.shape[0]
        hidden = [args.hidden_size, args.hidden_size]
        self.network = MLP(size, *hidden, 1 + len(self.low) + len(self.low) ** 2)

    def heads(self, obs):
        """V (...), mu and u (..., action_dim), L (..., action_dim, action_dim), all of obs."""
        dim = len(self.low)
        V, u, L = self.network(self.encoder(obs)).split([1, dim, dim * dim], -1)
        L = L.unflatten(-1, (dim, dim)).clamp(-5, 5)  # or exp might overflow
        diagonal = 1 + L.diagonal(dim1=-2, dim2=-1).exp()  # or mu might lose its gradient
        L = L.tril(-1) + diagonal.diag_embed()
        return V.squeeze(-1), self.center + self.scale * u.tanh(), u, L

    def q_values(self, actions, V, mu, L):
        """Q (...) of actions (..., action_dim); distances from mu are in halves of their range."""
        return V + advantage((actions - mu) / self.scale, L)                                # (3)

    @torch.inference_mode()
    def act(self, obs, deterministic=False, noise=0.0):
        """Actions (N, action_dim) for obs (N, *shape): mu(obs), moved by noise or not."""
        _, actions, *_ = self.heads(obs)
        if not deterministic:
            actions = actions + self.scale * noise
        return actions.clamp(self.low, self.high)  # so that what is stored is what is done


class ReplayBuffer:
    """The last `size` transitions, as tensors (size // num_envs, num_envs, ...) on the device."""

    def __init__(self, size, *transition):
        """One transition of every environment shows what the tensors must hold."""
        num_envs, device = len(transition[0]), transition[0].device
        self.rows, self.count = size // num_envs, 0
        needed = self.rows * sum(x.nbytes for x in transition)
        there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        if needed > there:
            raise UserError(f"buffer_size is {size:,}, which needs {needed:,} bytes of memory; "
                            f"there are {there:,}")
        if RANK == 0:
            print(f"replay buffer: {self.rows * num_envs:,} transitions, {needed / 1e6:,.1f} MB")
        self.data = [torch.zeros(self.rows, *x.shape, dtype=x.dtype, device=device)
                     for x in transition]

    def add(self, *transition):
        """Put one transition of every environment in the place of the oldest."""
        for x, new in zip(self.data, transition):
            x[self.count % self.rows] = new
        self.count += 1

    def sample(self, batch_size):
        """Any transitions (batch_size, ...), each as likely as the others."""
        filled, num_envs = min(self.count, self.rows), self.data[0].shape[1]
        index = torch.randint(filled * num_envs, (batch_size,), device=self.data[0].device)
        return [x.flatten(0, 1)[index] for x in self.data]

    def state_dict(self):
        filled = min(self.count, self.rows)  # of a mere view torch.save would write all rows
        return dict(count=self.count,
                    data=[torch.from_numpy(x[:filled].numpy(force=True)) for x in self.data])

    def load_state_dict(self, saved):
        self.count = saved["count"]
        for x, old in zip(self.data, saved["data"], strict=True):
            filled = x[:min(self.count, self.rows)]
            if filled.shape != old.shape:
                raise ValueError(f"its buffer is {tuple(old.shape)}, not {tuple(filled.shape)}")
            filled.copy_(old)


# ==================================================================================== Algorithm
def td_target(rewards, next_values, terminations, gamma):
    """The target (1): after a termination nothing follows, after a time limit the value does."""
    return rewards + gamma * (1 - terminations) * next_values


def advantage(offsets, L):
    """-offsets^T P offsets / 2 of (3): as -|L^T offsets|^2 / 2 it is 0 at mu, below 0 elsewhere."""
    return -(L.mT @ offsets.unsqueeze(-1)).squeeze(-1).square().sum(-1) / 2


def next_noise(noise, begins, theta, sigma):
    """The noise (5) of each environment (N, action_dim), which starts from 0 with an episode."""
    noise = (1 - theta) * (1 - begins).unsqueeze(-1) * noise
    return noise + sigma * torch.randn_like(noise)


def train(args, resume=""):
    """Train, from the start or on from the run folder `resume`; return agent and history."""
    if args.learning_starts > args.total_timesteps:
        raise UserError(f"learning_starts is {args.learning_starts:,}, "
                        f"beyond the {args.total_timesteps:,} total_timesteps")
    if args.buffer_size < max(args.batch_size, args.num_envs):
        raise UserError(f"buffer_size is {args.buffer_size:,}, below batch_size or num_envs")
    device = setup(args)
    envs = Envs(args.env, args.num_envs, device)
    agent, target = (Agent(envs.obs_space, envs.action_space, args).to(device) for _ in range(2))
    weights, target_weights = flatten(agent), flatten(target)
    target_weights.copy_(weights)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam([weights], learning_rate, fused=True,
                                 capturable=device.type == "cuda")
    obs = envs.tensor(np.zeros((args.num_envs, *envs.obs_space.shape)), envs.dtype)
    noise = torch.zeros(args.num_envs, len(agent.low), device=device)
    buffer = ReplayBuffer(args.buffer_size, obs, noise, obs, noise[:, 0], noise[:, 0])
    # Each process fills its own buffer; a checkpoint keeps the first's, and all resume with it.
    run = Run(args, envs, resume, agent=agent, target=target, optimizer=optimizer, buffer=buffer)
    optimizer.param_groups[0]["lr"].fill_(args.learning_rate)  # or a resumed run keeps the old

    @torch.inference_mode()
    def explore(obs, begins):
        """The actions mu(obs) + noise; the noise moves on."""
        theta = args.theta if args.noise == "ou" else 1
        noise.copy_(next_noise(noise, begins, theta, args.sigma))                           # (5)
        return agent.act(obs, noise=noise)

    def update(obs, actions, next_obs, rewards, terminations):
        """Take one Adam step on a batch (B, ...) and let the target follow; return loss and Q."""
        with torch.no_grad():
            next_values, *_ = target.heads(next_obs)
            targets = td_target(rewards, next_values, terminations, args.gamma)             # (1)
        V, mu, u, L = agent.heads(obs)
        q_values = agent.q_values(actions, V, mu, L)
        loss = F.mse_loss(q_values, targets) + (u.abs() - 2).clamp(min=0).square().mean()   # (2)
        weights.grad.zero_()
        loss.backward()
        average(weights.grad)
        weights.grad.mul_((args.max_grad_norm / weights.grad.norm()).clamp(max=1))
        optimizer.step()
        target_weights.lerp_(weights, args.tau)                                             # (4)
        return torch.stack([loss, q_values.mean()]).detach()

    explore, update = (capture(f, device) for f in (explore, update))
    while run.step < args.total_timesteps:
        run.checkpoint()
        for _ in range(args.train_every):
            obs = envs.obs
            if run.step < args.learning_starts:
                actions = agent.center + agent.scale * torch.empty_like(noise).uniform_(-1, 1)
            else:
                actions = explore(obs, envs.begins)
            next_obs, rewards, terminations, _ = envs.step(actions)
            buffer.add(obs, actions, next_obs, rewards, terminations)
        run.step += args.train_every * args.num_envs * WORLD_SIZE
        if run.step < args.learning_starts:
            run.progress()
            continue
        for _ in range(args.num_updates):
            loss, q_values = update(*buffer.sample(args.batch_size))
        run.log(loss=loss, q_values=q_values)
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
