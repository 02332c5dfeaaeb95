"""What the rules ask about the configuration. The only file with functions; the answers come from kdbench.plan."""

import re
import sys
import time
from pathlib import Path

SOURCE = str(Path(workflow.main_snakefile).resolve().parent / "src")
sys.path.insert(0, SOURCE)  # the library of this very folder, installed or not

from snakemake.exceptions import WorkflowError

from kdbench import cli, locks, status
from kdbench import config as configuration
from kdbench.errors import UserError
from kdbench.files import canonical
from kdbench.plan import Plan
from kdbench.teacher.parts import part_name, parts_of_job

cli.find_in_jobs(SOURCE)


def read_configuration():
    """The plan of this configuration, or one line for each of its mistakes."""
    try:
        settings = configuration.load(config)
        if workflow.local_exec and not workflow.dryrun:
            configuration.check_gpus(settings, configuration.gpus_here())
        return Plan(settings)
    except UserError as error:
        raise WorkflowError(str(error))


def guard_folder():
    """One run at a time; the lock of a run that was killed on this machine is no obstacle."""
    reads_only = {
        "--lint",
        "--report",
        "--summary",
        "--detailed-summary",
        "--dag",
        "--rulegraph",
        "--filegraph",
        "--list-rules",
    }
    if not workflow.is_main_process or workflow.dryrun or reads_only.intersection(sys.argv):
        return None
    try:
        return locks.hold_workflow(Path(".snakemake"))
    except UserError as error:
        raise WorkflowError(str(error))


STARTED = time.time()
PLAN = read_configuration()
LOCK = guard_folder()
CONFIG = PLAN.config
EVALUATION = CONFIG.evaluation
HARDWARE = CONFIG.hardware
_HARDWARE, _GENERATION = canonical(HARDWARE.model_dump()), canonical(PLAN.generation())  # of every job the same
EXPERIMENTS = list(CONFIG.experiments)
if LOCK is not None:
    status.write_plan(PLAN.runs())
VARIANTS = {name for variants in PLAN.variants.values() for name in variants}
FINE_TUNED = {v.name for variants in PLAN.variants.values() for v in variants.values() if v.needs.teacher != "signal"}
ANSWERED = {v.name for variants in PLAN.variants.values() for v in variants.values() if v.needs.teacher == "answers"}
BLOCKS = {name for blocks in PLAN.blocks.values() for name in blocks}


def one_of(names):
    """A regular expression for exactly these names."""
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


wildcard_constraints:
    experiment=one_of(EXPERIMENTS),
    method=one_of(VARIANTS | BLOCKS),
    model=one_of(CONFIG.models),
    teacher=one_of(CONFIG.teachers),
    dataset=one_of(CONFIG.datasets),
    readers=rf"({one_of(CONFIG.models)})(\+({one_of(CONFIG.models)}))?",
    group=rf"teachers/({one_of(CONFIG.teachers)})|({one_of(EXPERIMENTS)})/methods/({one_of(VARIANTS)})",
    run=rf"teachers/({one_of(CONFIG.teachers)})|({one_of(EXPERIMENTS)})/methods/({one_of(VARIANTS)})/seed\d+",
    seed=r"\d+",


# --- resources: where and how fast, never a reason to run anything again


def gpus(wildcards):
    """GPUs of a heavy job: those asked for, or one where there is one."""
    if HARDWARE.gpus != "auto":
        return HARDWARE.gpus
    return min(1, configuration.gpus_here()) if workflow.local_exec else 1


def memory(wildcards, attempt):
    return int(HARDWARE.memory_gb * 1024 * attempt)


def disk(wildcards):
    return int(HARDWARE.disk_gb * 1024)


def runtime(wildcards):
    return int(HARDWARE.runtime_hours * 60)


def on_device(wildcards, resources):
    """How a script that runs a model is started. It depends on resources only, hence is no reason for a rerun."""
    return f"python workflow/scripts/on_gpus.py {resources.gpu} -- python" if resources.gpu else "python"


def on_devices(wildcards, resources):
    """The same for trainings, which may have several processes."""
    processes = HARDWARE.processes or max(1, resources.gpu)
    if processes == 1:
        return on_device(wildcards, resources)
    wrapper = f"python workflow/scripts/on_gpus.py {resources.gpu} -- " if resources.gpu else ""
    return f"{wrapper}torchrun --standalone --nproc-per-node {processes}"


def hardware(wildcards, resources):
    """Settings of the machine for a script, as one JSON text."""
    return _HARDWARE


# --- data and models


def data_settings(wildcards):
    """The identity decides on a rerun; the rest is where to find it."""
    return canonical(PLAN.data(wildcards.dataset))


def data_source(wildcards, output):
    return canonical(CONFIG.datasets[wildcards.dataset].model_dump())


def model_identity(wildcards):
    return canonical(PLAN.model(wildcards.model))


def model_source(wildcards, output):
    return canonical(CONFIG.models[wildcards.model].model_dump())


def tokenizer_text_of(wildcards):
    """The records that a model's tokenizer is trained on, for models that bring none."""
    tokenizer = getattr(CONFIG.models[wildcards.model], "tokenizer", None)
    return records_of(tokenizer.train_on) if hasattr(tokenizer, "train_on") else []


def records_of(dataset):
    return f"resources/data/{dataset}/manifest.json"


def model_of(name):
    return f"resources/models/{name}/manifest.json"


def text_settings(wildcards):
    return canonical(CONFIG.text.model_dump())


def reader_models_of(wildcards):
    """The models whose tokenizers share a text: one, or student and teacher."""
    return [model_of(name) for name in wildcards.readers.split("+")]


def one_tokenizer(wildcards, input):
    """Methods that need one tokenizer for both readers: of models on the hub only the fetched files tell whether they share one."""
    variants = [
        v for name in EXPERIMENTS if PLAN.readers(name) == wildcards.readers for v in PLAN.variants[name].values()
    ]
    needing = sorted({variant.name for variant in variants if not variant.across_tokenizers})
    return f"--one-tokenizer {' '.join(needing)}" if needing else ""


# --- teachers


def teacher_base_of(wildcards):
    return model_of(CONFIG.teachers[wildcards.teacher].model)


def teacher_tokens_of(wildcards):
    """Tokens of the records that a teacher is tuned on, and of those of its dev loss."""
    teacher = CONFIG.teachers[wildcards.teacher]
    return [f"results/tokens/{teacher.model}/{dataset}/manifest.json" for dataset in (teacher.train, teacher.dev)]


def tuned_teacher(name):
    """A teacher's model: tuned here, or as it was fetched."""
    teacher = CONFIG.teachers[name]
    return f"results/teachers/{name}/model/manifest.json" if teacher.train else model_of(teacher.model)


def teacher_identity(wildcards):
    return canonical(PLAN.teacher(wildcards.teacher))


def cache_tokens_of(wildcards):
    """Tokens whose states a cache holds. They are those of the untuned teacher: tuning changes no tokenizer."""
    return f"results/tokens/{wildcards.student}+{CONFIG.teachers[wildcards.teacher].model}/{wildcards.dataset}/manifest.json"


CACHE = "results/teachers/{teacher}/cache/{student}/{dataset}"


def cache_parts(job, jobs):
    """What a job of so many writes of a teacher's cache."""
    return [f"{CACHE}/{part_name(part)}/manifest.json" for part in parts_of_job(job, jobs)]


def cache_folder(wildcards):
    return CACHE.format(**wildcards)


def numbers_of_parts(wildcards, output):
    """Those that a job writes. They follow from its outputs, and are no reason for a rerun by themselves."""
    return [Path(path).parent.name.removeprefix(part_name("")) for path in output]


def cache_dtype(wildcards):
    return CONFIG.teachers[wildcards.teacher].cache_dtype


# --- students


def experiment_of(wildcards):
    return CONFIG.experiments[wildcards.experiment]


def variant_of(wildcards):
    return PLAN.variants[wildcards.experiment][wildcards.method]


def run_identity(wildcards):
    return canonical(PLAN.run(wildcards.experiment, wildcards.method))


def student_of(wildcards):
    return model_of(experiment_of(wildcards).student)


def pair_of(wildcards):
    """Student and untuned teacher: the models whose tokenizers share an experiment's texts."""
    chosen = experiment_of(wildcards)
    return [model_of(chosen.student), model_of(CONFIG.teachers[chosen.teacher].model)]


def teacher_of(wildcards):
    return tuned_teacher(experiment_of(wildcards).teacher)


def pair_tokens(wildcards, dataset):
    return f"results/tokens/{PLAN.readers(wildcards.experiment)}/{dataset}/manifest.json"


def train_tokens_of(wildcards):
    """Tokens of the training records, or of the teacher's answers for methods that learn from those."""
    if variant_of(wildcards).needs.teacher == "answers":
        return f"results/{wildcards.experiment}/methods/{wildcards.method}/tokens/manifest.json"
    return pair_tokens(wildcards, experiment_of(wildcards).train)


def dev_tokens_of(wildcards):
    return pair_tokens(wildcards, experiment_of(wildcards).dev)


def train_records_of(wildcards):
    return records_of(experiment_of(wildcards).train)


def cache_of(wildcards):
    """The cache of the teacher's states, unless the configuration wants the teacher to run in every step."""
    if variant_of(wildcards).training.teacher == "live":
        return []
    chosen = experiment_of(wildcards)
    return f"results/teachers/{chosen.teacher}/cache/{chosen.student}/{chosen.train}/manifest.json"


def alignment_of(wildcards):
    """Pairs and chunks by bytes, for methods that ask for them."""
    needs = variant_of(wildcards).needs
    if needs.alignment != "byte" and not needs.chunks:
        return []
    return f"results/alignments/{PLAN.readers(wildcards.experiment)}/{experiment_of(wildcards).train}/manifest.json"


def spelling_of(wildcards):
    """Edit distances and warping paths, for methods that ask for them."""
    needs = variant_of(wildcards).needs
    if needs.alignment != "dtw" and not needs.spelling:
        return []
    return f"results/spellings/{PLAN.readers(wildcards.experiment)}/{experiment_of(wildcards).train}/manifest.json"


def vocabulary_of(wildcards):
    if not variant_of(wildcards).needs.vocabulary:
        return []
    return f"results/vocabularies/{PLAN.readers(wildcards.experiment)}/manifest.json"


# --- evaluation


def run_config_of(wildcards):
    """The identity of the model that an evaluation is of."""
    run = wildcards.run
    return f"results/{run}/config.json" if run.startswith("teachers/") else f"results/{Path(run).parent}/config.json"


def run_model_of(wildcards):
    run = wildcards.run
    return tuned_teacher(Path(run).name) if run.startswith("teachers/") else f"results/{run}/model/manifest.json"


def generation_settings(wildcards):
    return _GENERATION


def decode_seeds(wildcards, output):
    """One for each output; they are no reason for a rerun by themselves, outputs that are not there yet are."""
    return EVALUATION.decode_seeds


def group_config_of(wildcards):
    return f"results/{wildcards.group}/config.json"


def group_scores_of(wildcards):
    """Every set of answers of a teacher, or of a method's students: training seeds × data sets × decode seeds."""
    group = wildcards.group
    runs = [group]
    if not group.startswith("teachers/"):
        runs = [f"{group}/seed{seed}" for seed in CONFIG.experiments[Path(group).parts[0]].seeds]
    return collect(
        "results/{run}/evaluation/{dataset}/decode{decode}/scores.json",
        run=runs,
        dataset=EVALUATION.datasets,
        decode=EVALUATION.decode_seeds,
    )


# --- tables


def shown(wildcards):
    """The rows of the table that the wildcards name: all experiments, one, or one method of one."""
    if "method" in wildcards.keys():
        names = PLAN.blocks.get(wildcards.experiment, {}).get(wildcards.method, [wildcards.method])
        return PLAN.rows(wildcards.experiment, names)
    experiments = [wildcards.experiment] if "experiment" in wildcards.keys() else EXPERIMENTS
    return [row for experiment in experiments for row in PLAN.rows(experiment)]


def shown_tables(wildcards):
    """The scores of all models that a table shows, in all and record by record."""
    return list(dict.fromkeys(row[kind] for row in shown(wildcards) for kind in ("scores", "items")))


def shown_rows(wildcards):
    return canonical(shown(wildcards))


def shown_alignments(wildcards):
    """How well the tokens of the pairs align, for the notes of the table."""
    experiments = [CONFIG.experiments[name] for name in dict.fromkeys(row["experiment"] for row in shown(wildcards))]
    pairs = {(f"{chosen.student}+{CONFIG.teachers[chosen.teacher].model}", chosen.train) for chosen in experiments}
    return [f"results/alignments/{readers}/{dataset}/manifest.json" for readers, dataset in sorted(pairs)]


def forget_old_tables():
    """Tables that this run is to rebuild vanish first: should a part of it fail, no table of before is left to be believed."""
    for job in workflow.dag.needrun_jobs():
        if job.rule.name.startswith("aggregate"):
            for output in job.output:
                Path(output).unlink(missing_ok=True)


# --- what is told at the end


def tell_success():
    from kdbench import summary

    print(summary.success("results", "results/benchmarks", STARTED))


def tell_failure(snakemake_logs):
    from kdbench import summary

    print(summary.failure(snakemake_logs))
