"""Prompt lists: read and check them, and say which prompts a process sees at a step."""
import random


def read(path):
    """The prompts of a text file, one a line, stripped; empty lines are dropped. Raises ValueError naming the file."""
    try:
        lines = [line.strip() for line in open(path, encoding="utf-8-sig")]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; convert it, for example with iconv") from error
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{path}: no prompts in it; one prompt a line is expected")
    return found


def batch_of(prompts, step, batch, seed, process=0, processes=1):
    """The `batch` prompts that a process sees at a step: every epoch is a new shuffle of the list, dealt out in order, so that
    no prompt comes back before all others were seen, whatever the number of processes."""
    first = (step * processes + process) * batch
    orders = {}
    chosen = []
    for position in range(first, first + batch):
        epoch, index = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = list(range(len(prompts)))
            random.Random(f"{seed} {epoch}").shuffle(orders[epoch])
        chosen.append(prompts[orders[epoch][index]])
    return chosen
