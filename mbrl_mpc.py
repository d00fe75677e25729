# SPDX-License-Identifier: MIT
"""Model-based RL by planning: learn what actions lead to, then search for those that pay.

An ensemble of networks learns the environment from every transition seen so far. At each step the
agent imagines many plans with it, improves them by the cross-entropy method (CEM), executes the
first action and plans again: model-predictive control (MPC). Where data are few the members
differ, so a plan is judged by the mean return of particles that follow several of them.

(1)  member e:  (next_obs - obs, rewards) ~ Normal(mean_e, exp(log_var_e / 2)) and
                P(termination) = sigmoid(logit_e), all of them functions of (obs, actions)
(2)  loss = E[counts * (w * ((delta - mean)^2 / exp(log_var) + log_var) / 2 - log P(terminations))]
     with w = exp(log_var), held fixed, and delta = (next_obs - obs, rewards), standardised
(3)  next_obs = obs + mean_e + exp(log_var_e / 2) * noise, with e drawn anew at every step (ts1)
                or once for each particle (tsinf); or obs + the mean of all mean_e (mean)
(4)  return of a plan = sum over t of gamma^t * (alive[t] * rewards[t] + after[t])
                alive[t + 1] = alive[t] * (1 - ends[t])
                after[t + 1] = after[t] + alive[t] * ends[t] * min(rewards[t], 0)
(5)  mean, std = those of the elites, the best plans drawn from Normal(mean, std); discrete actions
                are drawn from the mean, how often the elites take each; both keep a floor
(6)  value_loss = E[(V(obs) - rewards - gamma * (1 - terminations) * target_V(next_obs))^2];
     if terminal_value, gamma^horizon * (alive * V + (1 - alive) * min(V, 0)), where both are
     those of step horizon, is a part of (4)

    repeat
        for num_steps steps of each environment
            in each of `rounds` rounds imagine `population` plans (3, 4) and fit the best (5)
            execute the first action of the mean; the others begin the next plan
        refit the statistics to all transitions and take num_updates Adam steps on (2) and (6)

Version 0.5 of Levine's CS 285 plans with a model of random data (--learning-starts as late as may
be), 1.0 adds the data of its plans but follows each for long (--replan-every 10), 1.5 replans at
every step, and an ensemble makes it PETS (Chua et al. 2018, arXiv:1805.12114). --planner random
takes the best of `population` random plans. All plans share one noise (3), so that luck favours
none. Where plans last equally long, as on CartPole, only V tells what the end of one is worth
(Lowrey et al. 2019, arXiv:1811.01848); like the rest it learns from all data, whichever plans they
are of. An imagined end, unlike a real one, does not end costs: (4) repeats a negative last reward,
or plans would flee into whatever the model takes for an end. Example: --env Pendulum-v1
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
    total_timesteps: int = arg(20_000, "steps over all environments and processes", 1)
    num_envs: int = arg(1, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of the networks, the environments and every draw", 0)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder to write; empty is a new one in runs/, or none from Python")
    checkpoint_every: int = arg(0, "steps between checkpoints, each a reset; 0 is a tenth or so", 0)
    # The algorithm.
    batch_size: int = arg(256, "transitions of an update, for each member", 1)
    learning_starts: int = arg(1000, "steps of random actions before learning", 0)
    num_steps: int = arg(200, "steps of each environment between rounds of updates", 1)
    num_updates: int = arg(500, "updates in a round", 1)
    learning_rate: float = arg(1e-3, "Adam's step size, lowered linearly to 0 over num_updates", 0)
    ensemble_size: int = arg(5, "members of the ensemble", 1)
    hidden_size: int = arg(200, "units in each of the two hidden layers", 1)
    propagation: typing.Literal["ts1", "tsinf", "mean"] = arg("ts1", "ts1, tsinf or mean (3)")
    num_particles: int = arg(5, "particles that try each plan, equally many for each member", 1)
    planner: typing.Literal["random", "cem"] = arg("cem", "random or cem (5)")
    gamma: float = arg(0.99, "discount factor", 0, 1)
    horizon: int = arg(25, "steps of a plan", 1)
    replan_every: int = arg(1, "steps that a plan is followed, unless an episode begins", 1)
    population: int = arg(200, "plans in a round of cem", 1)
    elites: int = arg(20, "best plans of a round of cem, which the next one resembles", 1)
    rounds: int = arg(3, "rounds of cem", 1)
    terminal_value: bool = arg(False, "add to a plan's return the value of where it leads (6)")
    tau: float = arg(0.1, "how far the target of V moves to V at each update", 0, 1)
    sigma: float = arg(0.5, "cem's first deviation of Box plans, relative to half their range", 0)
    correlation: float = arg(0.7, "that of the deviations of successive actions", 0, 0.99)

    def __init__(self, **given):
        settle(self, given)  # what is given beats the preset, which beats the default


SMALL = dict(num_steps=50, num_updates=200, learning_rate=5e-3, ensemble_size=3, num_particles=3,
             hidden_size=64, rounds=2)
PRESETS = {  # what is known to work; keys may be patterns
    "CartPole-v1": SMALL | dict(total_timesteps=5000, num_envs=5, learning_starts=500, horizon=15,
                                population=40, elites=5, correlation=0.0, terminal_value=True),
    "Pendulum-v1": SMALL | dict(total_timesteps=4000, num_envs=4, learning_starts=400, horizon=20,
                                population=75, elites=7, sigma=1.0)}
ACTION_SPACES = "Discrete", "Box"
LOG_VARS = -10, 2  # the range of log_var, where what is predicted has deviation 1
FLOOR = 0.1  # the part of its first width that a distribution of plans always keeps


# ===================================================================================== Networks
class Norm(nn.Module):
    """Standardises (..., size) by mean and deviation; what never varies is predicted exactly."""

    def __init__(self, size):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(size)), nn.Buffer(torch.ones(size))

    def fit(self, x):
        average(mean := x.mean(0))
        average(variance := (x - mean).square().mean(0))
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt() * (variance.sqrt() > 1e-6 * mean.abs()))  # less is rounding

    def forward(self, x):
        return (x - self.mean) / torch.where(self.std > 0, self.std, 1)

    def invert(self, x):
        return self.mean + self.std * x


class Model(nn.Module):
    """The ensemble, each of whose E members has its own rows of (E, B, ...), and the critic V."""

    def __init__(self, obs_size, action_size, args):
        super().__init__()
        self.propagation, outputs = args.propagation, obs_size + 1
        self.inputs, self.targets = Norm(obs_size + action_size), Norm(outputs)
        sizes = [obs_size + action_size, args.hidden_size, args.hidden_size, 2 * outputs + 1]
        self.weights = nn.ParameterList(
            torch.randn(args.ensemble_size, n, m) / math.sqrt(n) for n, m in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(args.ensemble_size, 1, m) for m in sizes[1:])
        self.critic = nn.Sequential(
            Norm(obs_size), nn.Linear(obs_size, args.hidden_size), nn.SiLU(),
            nn.Linear(args.hidden_size, args.hidden_size), nn.SiLU(),
            nn.Linear(args.hidden_size, 1), nn.Flatten(-2)) if args.terminal_value else None

    def forward(self, obs, actions):
        """(1), standardised: mean and log_var (E, B, obs_size + 1); logit (E, B)."""
        x = self.inputs(torch.cat([obs, actions], -1))
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.silu(x, inplace=not x.requires_grad) if n else x, weight)
        outputs = len(self.targets.mean)
        mean, log_var, logit = x.split([outputs, outputs, 1], -1)
        low, high = LOG_VARS
        return mean, low + (high - low) * log_var.sigmoid(), logit.squeeze(-1)

    def fit(self, obs, actions, next_obs, rewards):
        """Fit the statistics to all transitions (B, ...)."""
        self.inputs.fit(torch.cat([obs, actions], -1))
        self.targets.fit(torch.cat([next_obs - obs, rewards.unsqueeze(-1)], -1))
        if self.critic:
            self.critic[0].fit(obs)

    def loss(self, obs, actions, next_obs, rewards, terminations, beta=0):
        """The loss (2) of each transition (E, B), not yet times counts; w = exp(beta * log_var)."""
        mean, log_var, logit = self(obs, actions)
        delta = self.targets(torch.cat([next_obs - obs, rewards.unsqueeze(-1)], -1))
        losses = ((delta - mean).square() / log_var.exp() + log_var) / 2
        losses = (losses * (beta * log_var).exp().detach()).sum(-1)
        return losses + F.binary_cross_entropy_with_logits(logit, terminations, reduction="none")

    def predict(self, obs, actions, noise, order):
        """A step (3) of particles (P, B, ...): next_obs, and rewards and chances of an end (P, B).

        Taken in `order` (P,), each member moves as many of them as the others."""
        members = len(self.biases[0])
        outputs = self(*(x[order].reshape(members, -1, x.shape[-1]) for x in (obs, actions)))
        mean, log_var, logit = (
            x.reshape(*obs.shape[:2], *x.shape[2:])[order.argsort()] for x in outputs)
        ends = logit.sigmoid()
        if self.propagation == "mean":
            mean, ends, noise = *(x.mean(0, True).expand_as(x) for x in (mean, ends)), 0
        delta = self.targets.invert(mean + (log_var / 2).exp() * noise)
        return obs + delta[..., :-1], delta[..., -1], ends


class Agent(nn.Module):
    """The model and the planner that acts by it.

    `reward` and `termination`, functions of (obs, actions, next_obs), are used instead of what the
    model predicts, where they are known."""

    reward = termination = plans = None

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        if len(obs_space.shape) == 3:
            raise UserError(f"{NAME} imagines observations number by number, for which images are "
                            "too large; these scripts take them: reinforce, a2c, ppo, trpo, dqn, "
                            "ddpg, naf, cem_es")
        self.rounds, self.elites = (args.rounds, args.elites) if args.planner == "cem" else (1, 1)
        if self.elites > args.population:
            raise UserError(f"{args.elites} elites are more than the population, {args.population}")
        if args.num_particles % args.ensemble_size:
            raise UserError(f"{args.num_particles} particles cannot be shared equally by an "
                            f"ensemble of {args.ensemble_size}")
        if args.replan_every > args.horizon:
            raise UserError(f"replan_every is {args.replan_every}, beyond the {args.horizon} steps "
                            "of a plan")
        self.args, self.discrete = args, isinstance(action_space, gym.spaces.Discrete)
        if self.discrete:  # actions are one-hot; the mean of the elites is how often they take each
            low, high = torch.tensor([[0.0], [1.0]]).expand(2, int(action_space.n))
            center, scale = high / len(high), high
        else:
            low, high, center, scale = bounds(action_space)
        times = torch.arange(args.horizon + 1, dtype=torch.float32)
        apart = (times[1:] - times[1:].unsqueeze(1)).abs()
        chol = torch.linalg.cholesky(args.correlation ** apart)
        for name, x in dict(low=low, high=high, center=center, scale=scale, smooth=chol,
                            discounts=args.gamma ** times.view(-1, 1, 1)).items():
            self.register_buffer(name, x.clone(), persistent=False)
        self.model = Model(obs_space.shape[0], len(center), args)

    def vector(self, actions):
        """Actions (N,) or (N, A) as the model takes them (N, A)."""
        return F.one_hot(actions, len(self.center)).float() if self.discrete else actions

    def explore(self, num_envs):
        """Any actions (num_envs,) or (num_envs, A), each as likely as the others."""
        draws = torch.rand(num_envs, len(self.center), device=self.center.device)
        if self.discrete:
            return draws.argmax(-1)
        return (self.center + self.scale * (2 * draws - 1)).clamp(self.low, self.high)

    def luck(self, fixed=False):
        """All that planning leaves to chance: draws of plans, noise, the order of particles."""
        args, options = self.args, dict(device=self.center.device)
        options["generator"] = torch.Generator(**options).manual_seed(0) if fixed else None
        shape = self.rounds, args.population, args.horizon, len(self.center)
        # Correlated in time, as in iCEM (arXiv:2008.06389): to shake to and fro leads nowhere.
        draws = self.smooth @ torch.randn(shape, **options)
        draws[:, 0] = 0  # the mean itself, or of discrete actions the median, takes part
        particles = args.horizon, args.num_particles
        noise = torch.randn(*particles, 1, len(self.model.targets.mean), **options)
        noise[..., -1] = 0  # of a reward only the mean matters
        orders = torch.rand(*particles, **options).argsort(-1)
        if args.propagation != "ts1":
            orders = orders.sort(-1)[0]
        return draws, noise, orders

    def imagine(self, obs, plans, discounts, noise, orders):
        """The returns (4) of plans (N, K, H, A) from obs, means over particles (N, K).

        Of the discounts, each (..., N * K), the one after the plan's H is that of V (6)."""
        actions = plans.flatten(0, 1).transpose(0, 1)  # (H, N * K, A)
        obs = obs.repeat_interleave(plans.shape[1], 0).expand(self.args.num_particles, -1, -1)
        rewards, ends = [], []
        for t, action in enumerate(actions.unsqueeze(1).expand(-1, len(obs), -1, -1)):
            next_obs, reward, end = self.model.predict(obs, action, noise[t], orders[t])
            known = obs, action.argmax(-1) if self.discrete else action, next_obs
            rewards.append(self.reward(*known) if self.reward else reward)
            ends.append(self.termination(*known).float() if self.termination else end)
            obs = next_obs
        ends = torch.stack(ends)
        returns = plan_returns(torch.stack(rewards), ends, discounts)
        if self.args.terminal_value:  # an imagined end does not end the costs to come, either
            alive, values = (1 - ends).prod(0), self.model.critic(obs)
            values = alive * values + (1 - alive) * values.clamp(max=0)
            returns = returns + discounts[plans.shape[2]] * values                          # (6)
        return returns.mean(0).view(plans.shape[:2])

    def plan(self, obs, mean, draws, *luck):
        """Plans (N, H, A) for obs, better than the means (N, H, A) that they start from."""
        args, std = self.args, self.args.sigma * self.scale.expand_as(mean)
        if args.planner == "random":
            mean, std = self.center.expand_as(mean), self.scale.expand_as(mean)
            draws = draws if self.discrete else 2 * torch.special.ndtr(draws) - 1

        def draw(mean, std, draws):
            mean, std = mean.unsqueeze(1), std.unsqueeze(1)
            if not self.discrete:
                return (mean + std * draws).clamp(self.low, self.high)
            chances = mean.lerp(self.center, FLOOR).cumsum(-1)[..., :-1]
            index = (torch.special.ndtr(draws[..., :1]) > chances).sum(-1)
            return torch.eye(mean.shape[-1], device=obs.device)[index]

        def score(plans):
            return self.imagine(obs, plans, self.discounts, *luck)

        return cem(score, draw, mean, std, draws, self.elites)

    @torch.inference_mode()
    def begin(self, begins):
        """Forget the plan of each environment that begins an episode (N,)."""
        if self.plans is None or len(self.plans) != len(begins):
            self.plans = self.center.repeat(len(begins), self.args.horizon, 1)
            begins = torch.ones_like(begins)
        if begins.any():
            self.plans = torch.where(begins.view(-1, 1, 1) > 0, self.center, self.plans)
            self.age = 0

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """The first actions (N,) or (N, A) of plans for obs; if deterministic, with fixed luck."""
        if self.plans is None or len(self.plans) != len(obs):
            self.begin(obs.new_ones(len(obs)))
        self.plans = torch.cat([self.plans[:, 1:], self.center.expand_as(self.plans[:, :1])], 1)
        if self.age % self.args.replan_every == 0:
            self.plans = self.plan(obs, self.plans, *self.luck(deterministic))
        self.age += 1
        actions = self.plans[:, 0]
        return actions.argmax(-1) if self.discrete else actions


class Data:
    """All transitions so far, as tensors (B, ...)."""

    def __init__(self):
        self.data = []

    def add(self, *transitions):
        self.data = [torch.cat(x) for x in zip(self.data, transitions)] or list(transitions)

    def sample(self, *shape):
        """Any transitions (*shape, ...), each as likely as the others."""
        index = torch.randint(len(self.data[0]), shape, device=self.data[0].device)
        return [x[index] for x in self.data]

    def state_dict(self):
        return dict(data=self.data)

    def load_state_dict(self, saved):
        self.data = saved["data"]


# ==================================================================================== Algorithm
def plan_returns(rewards, ends, discounts):
    """Returns (4) for rewards and chances of an end (H, ...)."""
    alive, after, returns = 1, 0, 0
    for reward, end, discount in zip(rewards, ends, discounts):
        returns = returns + discount * (alive * reward + after)
        after = after + alive * end * reward.clamp(max=0)
        alive = alive * (1 - end)
    return returns


def cem(score, draw, mean, std, draws, elites):
    """The mean (N, H, A) of the best plans (5), after a round for each row of draws.

    A plan whose score is not a finite number is no elite unless all are such."""
    floor = FLOOR * std
    for row in draws:
        plans = draw(mean, std, row)  # (N, K, H, A)
        returns = score(plans)  # (N, K)
        best = torch.where(returns.isfinite(), returns, -math.inf).topk(elites)
        index = torch.where(best.values > -math.inf, best.indices, best.indices[:, :1])
        chosen = plans.take_along_dim(index[..., None, None], 1)
        mean, std = chosen.mean(1), chosen.std(1, correction=0).clamp(min=floor)
    return mean


def train(args, resume="", reward=None, termination=None):
    """Train, from the start or on from the run folder `resume`; return agent and history.

    `reward` and `termination` are what is known of the environment, see Agent."""
    round_steps = args.num_steps * args.num_envs * WORLD_SIZE
    if args.learning_starts > (args.total_timesteps - 1) // round_steps * round_steps:
        raise UserError(f"learning_starts is {args.learning_starts:,}, which leaves no round of "
                        f"{round_steps:,} steps of the {args.total_timesteps:,} total_timesteps")
    device = setup(args)
    envs = Envs(args.env, args.num_envs, device)
    agent, target = (Agent(envs.obs_space, envs.action_space, args).to(device) for _ in range(2))
    agent.reward, agent.termination, model = reward, termination, agent.model
    weights, target_weights = flatten(agent), flatten(target)
    target_weights.copy_(weights)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam([weights], learning_rate, fused=True,
                                 capturable=device.type == "cuda")
    data = Data()
    # Each process gathers its own data; a checkpoint keeps the first's, and all resume with it.
    run = Run(args, envs, resume, agent=agent, target=target, optimizer=optimizer, data=data)

    def update(obs, actions, next_obs, rewards, terminations, counts):
        """Take one Adam step on a batch (B, ...) for each of E members; return V's loss."""
        # Without the weight w what is predicted well would leave the rest hardly any gradient
        # (Seitzer et al. 2022, arXiv:2203.09168). What is logged has w = 1 and no counts.
        losses = model.loss(obs, actions, next_obs, rewards, terminations, beta=1)
        loss = (counts * losses).mean(1).sum()                                              # (2)
        value_loss = torch.zeros_like(loss)
        if args.terminal_value:
            with torch.no_grad():
                next_values = target.model.critic(next_obs)
                targets = rewards + args.gamma * (1 - terminations) * next_values
            value_loss = F.mse_loss(model.critic(obs), targets)                             # (6)
        weights.grad.zero_()
        (loss + value_loss).backward()
        average(weights.grad)
        optimizer.step()
        target_weights.lerp_(weights, args.tau)
        return value_loss.detach()

    @torch.inference_mode()
    def judge(plans, obs, actions, next_obs, rewards, terminations, dones):
        """For a rollout (T, N, ...) that the model has yet to learn: its loss, the return (4)
        that it predicted for the first plan, and the one had by replanning from there."""
        batch = (x.flatten(0, 1).expand(args.ensemble_size, -1, *x.shape[2:])
                 for x in (obs, actions, next_obs, rewards, terminations))
        # After a truncation nobody knows what would have followed; there both sums stop.
        known = F.pad((1 - dones * (1 - terminations)).cumprod(0), (0, 0, 1, 0), value=1)
        steps = min(args.horizon, len(obs))
        plan = agent.vector(plans[0].argmax(-1)) if agent.discrete else plans[0]  # as executed
        discounts = F.pad(agent.discounts[:steps, 0] * known[:steps], (0, 0, 0, 1))  # without V
        predicted = agent.imagine(obs[0], plan[:, None, :steps], discounts[:, None],
                                  *agent.luck()[1:])
        realised = plan_returns(rewards, terminations, discounts)
        return model.loss(*batch).mean(), predicted.mean(), realised.mean()

    agent.plan, update = capture(agent.plan, device), capture(update, device)
    while run.step < args.total_timesteps:
        run.checkpoint()
        rollout, plans = [], run.step >= args.learning_starts
        for _ in range(args.num_steps):
            agent.begin(envs.begins)
            obs, actions = envs.obs, agent.act(envs.obs) if plans else agent.explore(args.num_envs)
            rollout.append((agent.plans, obs, agent.vector(actions), *envs.step(actions)))
            run.step += args.num_envs * WORLD_SIZE
            run.progress()
        _, *transitions, dones = rollout = [torch.stack(x) for x in zip(*rollout)]  # (T, N, ...)
        # Each member sees a transition as often as a bootstrap of all of them would hold it.
        counts = torch.poisson(torch.ones(*dones.shape, args.ensemble_size, device=device))
        data.add(*(x.flatten(0, 1) for x in (*transitions, counts)))
        if run.step < args.learning_starts:
            continue
        if plans:
            validation_loss, predicted, realised = judge(*rollout)
        model.fit(*data.data[:4]), target.model.fit(*data.data[:4])
        for k in range(args.num_updates):
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - k / args.num_updates))
            *batch, counts = data.sample(args.ensemble_size, args.batch_size)
            value_loss = update(*batch, counts.diagonal(dim1=0, dim2=2).T)
            run.progress()
        if plans:
            with torch.no_grad():
                model_loss = model.loss(*batch).mean()
            run.log(model_loss=model_loss, value_loss=value_loss, validation_loss=validation_loss,
                    predicted_return=predicted, realised_return=realised)
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
