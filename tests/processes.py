"""Scripts as processes of their own, as `python script.py ...` starts them, but without the wait.

A server that has imported the libraries forks every process, so none spends seconds on importing.
A process may carry a bomb: a function that runs first and arranges its death, or another fate."""
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "torch._dynamo", "gymnasium", "gymnasium.envs.classic_control.cartpole",
    "gymnasium.envs.mujoco.inverted_pendulum_v5", "matplotlib.figure", "torch.utils.tensorboard"])


class Script(CONTEXT.Process):
    def __init__(self, path, *words, folder, bomb=None):
        super().__init__(daemon=True)
        self.path, self.words, self.bomb = str(path), [str(word) for word in words], bomb
        self.folder = pathlib.Path(folder)
        self.start()

    def run(self):
        os.chdir(self.folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.argv = [self.path, *self.words]
        sys.path.insert(0, os.path.dirname(self.path))
        if self.bomb:
            self.bomb()
        runpy.run_path(self.path, run_name="__main__")

    def end(self):
        """Wait for the end; give exit code, output and errors."""
        self.join(300)
        if self.is_alive():
            self.kill()
            raise RuntimeError(f"{self.path} {self.words} does not end")
        return self.exitcode, *((self.folder / name).read_text() for name in ("stdout", "stderr"))


def find(folder):
    """Let the script find modules in this folder."""
    sys.path.append(folder)


def be_alone(*folders):
    """Forget these folders, and be a terminal as with PYTHONIOENCODING=ascii."""
    sys.path[:] = [path for path in sys.path if path not in folders]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


def join(rank, port):
    """Be process `rank` of two, as torchrun would start it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def have_a_rank():
    """Be left with the variable RANK of a batch system, but no other processes."""
    os.environ.pop("WORLD_SIZE", None)
    os.environ["RANK"] = "1"


def close_stdout():
    """Print into a pipe whose reader has gone away, as in `python ppo.py | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(call, function):
    """The function, but its call-th call dies."""
    calls = []

    def mortal(*args):
        calls.append(1)
        return die() if len(calls) == call else function(*args)

    return mortal


def die_in_step(call):
    """Die in the call-th step of the vector environment that the script makes its own of."""
    import gymnasium as gym

    class Mortal(gym.vector.SyncVectorEnv):
        def __init_subclass__(cls):
            cls.step = dying(call, cls.step)

    gym.vector.SyncVectorEnv = Mortal


def die_in_save(call):
    """Die when half of the call-th checkpoint is written."""
    import torch

    save, calls = torch.save, []

    def mortal(obj, file, *args, **kwargs):
        save(obj, file, *args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    torch.save = mortal


def die_in_rename(call):
    """Die between writing a file and putting it in place."""
    os.replace = dying(call, os.replace)
