rule generate:
    """The answers of one model to one data set with one decode seed."""
    input:
        script="workflow/scripts/generate.py",
        config=run_config_of,
        model=run_model_of,
        records="resources/data/{dataset}/manifest.json",
    output:
        "results/{run}/evaluation/{dataset}/decode{decode}/predictions.jsonl",
    log:
        "logs/generate/{run}/{dataset}_decode{decode}.log",
    benchmark:
        "results/benchmarks/generate/{run}/{dataset}_decode{decode}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: HARDWARE.threads
    resources:
        gpu=lambda wildcards: min(1, gpus(wildcards)),
        mem_mb=memory,
        runtime=240,
    params:
        settings=generation_settings,
        launch=on_device,
        hardware=hardware,
    shell:
        "{params.launch} {input.script} --model {input.model} --records {input.records} --settings {params.settings:q}"
        " --seed {wildcards.decode} --hardware {params.hardware:q} --output {output} > {log} 2>&1"


rule score:
    input:
        script="workflow/scripts/score.py",
        predictions="results/{run}/evaluation/{dataset}/decode{decode}/predictions.jsonl",
    output:
        "results/{run}/evaluation/{dataset}/decode{decode}/scores.json",
    log:
        "logs/score/{run}/{dataset}_decode{decode}.log",
    benchmark:
        "results/benchmarks/score/{run}/{dataset}_decode{decode}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        stemmer="--stemmer" if EVALUATION.stemmer else "",
    shell:
        "python {input.script} --predictions {input.predictions} {params.stemmer} --output {output} > {log} 2>&1"
