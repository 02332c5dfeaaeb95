"""kdbench: distillation methods of language models, compared, also across tokenizers.

    download_model ─┬──────────── sft_teacher ─┬─ cache_teacher ──────┐
                    │                          └─ generate_answers ─┐ │
    prepare_data ───┴─ tokenize ── align, spell, map_vocabulary ────┴─┴─ distill / sft_student ── generate ── score ── aggregate

    snakemake --cores 8 results/table.csv                                   everything
    snakemake --cores 8 results/<experiment>/methods/<method>/table.csv     one method
    snakemake --cores 8 results/<experiment>/table.csv                      one experiment
    snakemake --workflow-profile profiles/slurm results/table.csv           on a cluster

What to run stands in config/config.yaml, who does it in rules/*.smk, and where it ends up:

    resources/data/<data set>/          records                       resources/models/<model>/     models as fetched
    results/tokens/<readers>/<data set>/                              results/{alignments,spellings}/<readers>/<data set>/
    results/vocabularies/<readers>/     relation of two vocabularies
    results/teachers/<teacher>/         model, cache, evaluation      results/<experiment>/methods/<method>/seed<n>/   the same of a student
"""

from snakemake.utils import min_version

min_version("9.25")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "rules/common.smk"
include: "rules/models.smk"
include: "rules/data.smk"
include: "rules/teacher.smk"
include: "rules/student.smk"
include: "rules/evaluate.smk"
include: "rules/tables.smk"


onstart:
    forget_old_tables()


onsuccess:
    tell_success()


onerror:
    tell_failure(log)


localrules:
    all,


rule all:
    default_target: True
    input:
        "results/table.csv",
