"""lm-evaluation-harness over a reader: its tasks, prompts and metrics, with our model's probabilities.

Nothing is downloaded: a task's data lies in the local cache of Hugging Face's `datasets`, or where the YAML of a task
of one's own says. Importing this module raises ValueError where lm-eval is not installed.
"""

from __future__ import annotations

import difflib
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from atlas_megatron.evaluate.continuations import Answer, Generation, Question, alike, ask, batches, write
from atlas_megatron.inference.reader import Reader
from atlas_megatron.inference.streaming import check_sampling

try:
    import datasets
    import lm_eval.tasks
    import sqlitedict
    from huggingface_hub import constants
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
    from tqdm import tqdm
except ImportError as error:
    raise ValueError(
        f"tasks of lm-evaluation-harness need the lm-eval package ({error}); install it with: "
        "pip install -e '.[eval]' -c constraints.txt"
    ) from error

# The paper's tasks, and where lm-eval keeps them: reading all of its thousands of YAML files takes half a minute.
PAPER_TASKS = {
    "wikitext": "wikitext",
    "lambada_openai": "lambada",
    "lambada_standard": "lambada",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "social_iqa": "siqa",
    "boolq": "super_glue/boolq",
    "swde": "swde",
    "fda": "fda",
    "squad_completion": "squad_completion",
}
# Folders of lm-eval whose tasks have names like those of atlas-eval's own.
LIKE_OURS = ("babilong", "libra", "ruler")
# Draws for the standard error of metrics that have no formula for it. It is then known to 2 %; lm-eval's 100,000 take
# minutes for a metric.
DRAWS = 1000
GENERATION_OPTIONS = ("do_sample", "max_gen_toks", "temperature", "top_p", "until")


class AtlasLM(TemplateLM):
    """A reader as lm-eval sees a model; answers do not depend on batches and segments.

    Text is cut into context and continuation as lm-eval does it for its own models. An empty context is the
    end-of-document token, as before every document in training. There is no longest input and nothing is ever cut off:
    texts are read in segments through the state. So loglikelihood_rolling reads a document as one text, without
    windows: every token has the whole document before it as its context, as far as the model's layers keep it.
    """

    def __init__(self, reader: Reader, batch: int = 8, segment: int = 512, seed: int = 0) -> None:
        """batch: texts read together; segment: tokens of each read at once; seed: of tasks that sample.

        Raises ValueError for arguments out of range.
        """
        super().__init__()
        if batch < 1 or segment < 1:
            raise ValueError(f"batch={batch} and segment={segment} must each be at least 1")
        self._reader, self._batch, self._segment, self._seed = reader, batch, segment, seed
        self._device = reader.device

    @property
    def eot_token_id(self) -> int:
        return self._reader.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """No special tokens, whatever is asked: documents of the training data have none but their end."""
        return self._reader.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Of each (context, continuation): its log-likelihood in nats, and whether greedy decoding would write it."""
        for request in requests:
            if not request.args[1]:
                raise ValueError(
                    f"a task asks for an empty continuation of {request.args[0][-40:]!r}; correct its YAML"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        """What the inherited `loglikelihood` asks: (texts, context, continuation) of each request."""
        together: dict[tuple[int, ...], list[int]] = {}
        for number, ((before, after), context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(
                    f"the continuation {after!r} of {before[-40:]!r} melts into the context's last token; "
                    "begin it with a space or another character that the tokenizer cuts before"
                )
            # A context of spaces alone has gone to the continuation.
            together.setdefault(tuple(context) or (self.prefix_token_id,), []).append(number)
        numbers = list(together.values())
        questions = [Question(context, [requests[n][2] for n in same]) for context, same in together.items()]
        answers: dict[int, Answer] = {}
        for place, found in self._asked(questions, disable_tqdm):
            for number, answer in zip(numbers[place], found, strict=True):
                answers[number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (document,): its log-likelihood in nats, read as one text after the end-of-document token."""
        documents = [self.tok_encode(request.args[0]) for request in requests]
        numbers = [number for number, tokens in enumerate(documents) if tokens]
        questions = [Question([self.prefix_token_id], [documents[number]]) for number in numbers]
        answers = [0.0] * len(requests)  # also of an empty document
        for place, ((total, _),) in self._asked(questions, disable_tqdm):
            answers[numbers[place]] = total
            self.cache_hook.add_partial("loglikelihood_rolling", requests[numbers[place]].args, total)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, options): the continuation before the first `until` string."""
        together: dict[Generation, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(_generation(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts continued", disable=disable_tqdm) as progress:
            for how, numbers in together.items():
                contexts = [self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers]
                # Where lengths differ by no more than is written, a batch takes at most twice as many steps.
                for places in alike([len(context) for context in contexts], self._batch, how.most):
                    seeds = [self._seed + numbers[place] for place in places]
                    found = write(self._reader, [contexts[place] for place in places], how, seeds, self._segment)
                    for place, text in zip(places, found, strict=True):
                        texts[numbers[place]] = text
                        self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
                    progress.update(len(places))
        return [texts[number] for number in range(len(requests))]

    def _asked(self, questions: list[Question], quiet: bool) -> Iterator[tuple[int, list[Answer]]]:
        """The number of each question with its answers, as they come."""
        total = sum(len(question.continuations) for question in questions)
        with tqdm(total=total, desc="continuations read", disable=quiet) as progress:
            for numbers in batches(questions, self._batch):
                found = ask(self._reader, [questions[number] for number in numbers], self._segment)
                yield from zip(numbers, found, strict=True)
                progress.update(sum(map(len, found)))


def _generation(options: dict[str, Any]) -> Generation:
    """A task's options in the reader's terms. Raises ValueError for options that are unknown or out of range."""
    said = dict(normalize_gen_kwargs(options, DEFAULT_MAX_GEN_TOKS))
    unknown = sorted(set(said) - set(GENERATION_OPTIONS))
    if unknown:
        raise ValueError(
            f"a task generates with {', '.join(unknown)}, which this model does not offer; "
            f"its generation_kwargs may hold {', '.join(GENERATION_OPTIONS)}"
        )
    if said["max_gen_toks"] < 1:
        raise ValueError(f"a task generates max_gen_toks={said['max_gen_toks']} tokens; ask for at least 1")
    temperature, top_p = float(said.get("temperature", 0.0)), float(said.get("top_p", 1.0))
    check_sampling(temperature, top_p)
    return Generation(said["max_gen_toks"], tuple(stop for stop in said["until"] if stop), temperature, top_p)


def run(
    tasks: Sequence[str],
    reader: Reader,
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
    segment: int = 512,
    seed: int = 0,
    cache: Path | None = None,
) -> dict[str, Any]:
    """lm-eval's results on these tasks, as JSON takes them; `results` in it holds the metrics by task.

    tasks: of the paper (PAPER_TASKS), of YAML files under the folder `include_path`, or any other of lm-eval's.
    shots: solved examples before each question, where the task does not set it. limit: questions of each task, from
    its beginning; for trying out. batch, segment, seed: as AtlasLM. cache: the beginning of the name of a file in which
    answers are kept as they come, so that an interrupted run goes on; it is of one model and seed alone.

    Raises ValueError for an unknown task, data that is not on this machine, and arguments out of range; all of that
    before anything is read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 question; leave it out for all")
    if shots is not None and shots < 0:
        raise ValueError(f"shots={shots} must be 0 or more")
    model = AtlasLM(reader, batch, segment, seed)
    with _offline(), patch.object(sqlitedict, "SqliteDict", _PlainAnswers):
        manager = _manager(tasks, include_path)
        loaded = _load(manager, tasks)
        results = simple_evaluate(
            model,
            tasks=list({id(task): task for found in loaded.values() for task in found.values()}.values()),
            num_fewshot=shots,
            limit=limit,
            use_cache=None if cache is None else str(cache),
            bootstrap_iters=DRAWS,
            log_samples=False,
            task_manager=manager,
        )
    # A tag's tasks are not summed up, and lm-eval does not say whose they are.
    members = {name: list(found) for name, found in loaded.items() if name not in found}
    results["group_subtasks"] = members | results.get("group_subtasks", {})
    return json.loads(json.dumps(results, default=handle_non_serializable))


def knows(task: str, include_path: Path | None = None) -> bool:
    """Whether the folder, or lm-eval where its names are much like ours, has a task, group or tag of that name."""
    theirs = Path(lm_eval.tasks.__file__).parent
    own = [] if include_path is None else [include_path]
    return (
        task
        in TaskManager(include_path=[*(theirs / name for name in LIKE_OURS), *own], include_defaults=False).all_tasks
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and lists of them; no class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _plain(stored: bytes) -> Any:
    """An answer that lm-eval kept, which it would unpickle without limits. Raises ValueError where it is none."""
    try:
        return _PlainUnpickler(io.BytesIO(bytes(stored))).load()
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"a kept answer cannot be read ({error}); remove the file answers_* among results") from error


@contextmanager
def _offline() -> Iterator[None]:
    """Within: no library asks the network. They read HF_HUB_OFFLINE when they are imported, and no more."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """One that knows the tasks. Raises ValueError where there is none of a name."""
    if not tasks:
        raise ValueError(f"no task was named; the paper's are {', '.join(PAPER_TASKS)}")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path={include_path} is no folder; give one with the YAML files of tasks")
    own = [] if include_path is None else [include_path]
    theirs = Path(lm_eval.tasks.__file__).parent
    folders = sorted({theirs / PAPER_TASKS[name] for name in tasks if name in PAPER_TASKS})
    manager = TaskManager(include_path=[*folders, *own], include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=own)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"lm-eval knows no task {name!r}; {meant}the paper's are {', '.join(PAPER_TASKS)}")
    return manager


def _load(manager: TaskManager, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """lm-eval's task objects with their data, by name: of a task or group itself, of a tag all of its tasks.

    Raises ValueError that names every task whose data is not here.
    """
    loaded: dict[str, dict[str, Any]] = {}
    known: dict[str, Any] = {}  # tags and names may overlap
    absent: list[str] = []
    for name in dict.fromkeys(tasks):
        try:
            found = manager.load([name])
        except (OSError, KeyError, ValueError, datasets.exceptions.DatasetsError) as error:
            # What is not in the cache is asked of the network, or is there in another configuration alone.
            if not isinstance(error, ConnectionError) and "find cache" not in str(error):
                reason = str(error).splitlines()[0]
                raise ValueError(f"task {name} cannot be loaded: {reason}; correct its YAML or its data") from error
            absent.append(name)
            continue
        own = {name: found["groups"][name]} if name in found["groups"] else found["tasks"]
        loaded[name] = {task: known.setdefault(task, value) for task, value in own.items()}
    if absent:
        raise ValueError(
            f"the data of {', '.join(absent)} is not in {datasets.config.HF_DATASETS_CACHE}; on a machine with a "
            f"network run: lm-eval run --model dummy --tasks {','.join(absent)} --limit 1, and copy its "
            "~/.cache/huggingface/datasets there"
        )
    return loaded


def of_task(results: dict[str, Any], task: str) -> dict[str, Any]:
    """What concerns one task, or the tasks of a group or tag, in what `run` returned. Raises ValueError for nothing."""
    names = {task, *results.get("group_subtasks", {}).get(task, [])}
    if not names & results["results"].keys():
        raise ValueError(f"lm-eval measured nothing of {task}; ask for its tasks by their own names")
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    return {
        key: {name: value for name, value in results[key].items() if name in names} for key in kept if key in results
    }


def scores(results: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Each metric in what `run` returned: its value and standard error (0: there is none)."""
    found: dict[str, tuple[float, float]] = {}
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            label = f"{name} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            found[label] = (float(value), float(error) if isinstance(error, int | float) else 0.0)
    return found


class _PlainAnswers(sqlitedict.SqliteDict):  # type: ignore[misc]
    """lm-eval's kept answers, read as plain data."""

    def __init__(self, path: str, autocommit: bool = False) -> None:
        super().__init__(path, autocommit=autocommit, decode=_plain)
