rule generate:
    """The answers of one model to one data set with all decode seeds, which share what is computed of the prompts.

    Another decode seed runs this again. `update` leaves the answers of the others where they are, and the script keeps those that are of
    this very model, data and settings (`identity.json` beside them says so); it makes all others anew.
    """
    input:
        script="workflow/scripts/generate.py",
        config=run_config_of,
        model=run_model_of,
        records="resources/data/{dataset}/manifest.json",
    output:
        update(
            expand(
                "results/{run}/evaluation/{dataset}/decode{decode}/predictions.jsonl",
                decode=EVALUATION.decode_seeds,
                allow_missing=True,
            )
        ),
    log:
        "logs/generate/{run}/{dataset}.log",
    benchmark:
        "results/benchmarks/generate/{run}/{dataset}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: HARDWARE.threads
    resources:
        gpu=lambda wildcards: min(1, gpus(wildcards)),
        mem_mb=memory,
        runtime=runtime,
    params:
        settings=generation_settings,
        seeds=decode_seeds,
        launch=on_device,
        hardware=hardware,
    shell:
        "{params.launch} {input.script} --model {input.model} --records {input.records} --settings {params.settings:q}"
        " --seeds {params.seeds} --hardware {params.hardware:q} --output {output} > {log} 2>&1"


rule score:
    """The scores of one model's answers to all data sets: many small computations, one start of Python."""
    input:
        script="workflow/scripts/score.py",
        predictions=expand(
            "results/{run}/evaluation/{dataset}/decode{decode}/predictions.jsonl",
            dataset=EVALUATION.datasets,
            decode=EVALUATION.decode_seeds,
            allow_missing=True,
        ),
    output:
        expand(
            "results/{run}/evaluation/{dataset}/decode{decode}/scores.json",
            dataset=EVALUATION.datasets,
            decode=EVALUATION.decode_seeds,
            allow_missing=True,
        ),
    log:
        "logs/score/{run}.log",
    benchmark:
        "results/benchmarks/score/{run}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        stemmer="--stemmer" if EVALUATION.stemmer else "",
    shell:
        "python {input.script} --predictions {input.predictions} {params.stemmer} --output {output} > {log} 2>&1"
