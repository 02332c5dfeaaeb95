localrules:
    collect_scores,
    aggregate_method,
    aggregate_experiment,
    aggregate,


rule collect_scores:
    """The scores of a teacher, or of a method's students, as one long table."""
    input:
        script="workflow/scripts/collect_scores.py",
        config=group_config_of,
        scores=group_scores_of,
    output:
        scores="results/{group}/scores.csv",
        by_record="results/{group}/items.csv",
    log:
        "logs/collect_scores/{group}.log",
    benchmark:
        "results/benchmarks/collect_scores/{group}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    shell:
        "python {input.script} --scores {input.scores} --output {output.scores} --items {output.by_record} > {log} 2>&1"


rule aggregate_method:
    input:
        script="workflow/scripts/aggregate.py",
        scores=shown_tables,
    output:
        "results/{experiment}/methods/{method}/table.csv",
    log:
        "logs/aggregate_method/{experiment}/{method}.log",
    benchmark:
        "results/benchmarks/aggregate_method/{experiment}/{method}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        rows=shown_rows,
    shell:
        "python {input.script} --rows {params.rows:q} --table {output} > {log} 2>&1"


rule aggregate_experiment:
    input:
        script="workflow/scripts/aggregate.py",
        scores=shown_tables,
    output:
        "results/{experiment}/table.csv",
    log:
        "logs/aggregate_experiment/{experiment}.log",
    benchmark:
        "results/benchmarks/aggregate_experiment/{experiment}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        rows=shown_rows,
    shell:
        "python {input.script} --rows {params.rows:q} --table {output} > {log} 2>&1"


rule aggregate:
    """The product: one row per experiment, model, method and objective."""
    input:
        script="workflow/scripts/aggregate.py",
        scores=shown_tables,
        alignments=shown_alignments,
    output:
        table=report(
            "results/table.csv",
            caption="../workflow/report/table.rst",
            category="ROUGE-L",
            labels={"what": "table"},
        ),
        scores="results/scores.csv",
        comparisons="results/comparisons.csv",
        markdown="results/table.md",
        latex="results/table.tex",
    log:
        "logs/aggregate.log",
    benchmark:
        "results/benchmarks/aggregate.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        rows=shown_rows,
        settings=generation_settings,
    shell:
        "python {input.script} --rows {params.rows:q} --settings {params.settings:q} --alignments {input.alignments}"
        " --table {output.table} --scores {output.scores} --comparisons {output.comparisons} --markdown {output.markdown}"
        " --latex {output.latex} > {log} 2>&1"
