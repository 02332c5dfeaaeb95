localrules:
    configure,


rule configure:
    """Write down all that decides a method's runs: its settings and everything upstream of them.

    Training, generation and tables have this file as an input. Each remembers it on its own, so a training that fails after a change
    leaves nothing of before behind unnoticed.
    """
    input:
        script="workflow/scripts/configure.py",
    output:
        "results/{experiment}/methods/{method}/config.json",
    log:
        "logs/configure/{experiment}/{method}.log",
    benchmark:
        "results/benchmarks/configure/{experiment}/{method}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        identity=run_identity,
    shell:
        "python {input.script} --identity {params.identity:q} --output {output} > {log} 2>&1"


rule sft_student:
    input:
        script="workflow/scripts/sft.py",
        config="results/{experiment}/methods/{method}/config.json",
        model=student_of,
        train=train_tokens_of,
        dev=dev_tokens_of,
    output:
        "results/{experiment}/methods/{method}/seed{seed}/model/manifest.json",
    log:
        "logs/sft_student/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "results/benchmarks/sft_student/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        method=one_of(FINE_TUNED),
    conda:
        "../envs/kdbench.yaml"
    threads: HARDWARE.threads
    resources:
        gpu=gpus,
        mem_mb=memory,
        disk_mb=disk,
        runtime=runtime,
    params:
        launch=on_devices,
        hardware=hardware,
    shell:
        "{params.launch} {input.script} --config {input.config} --seed {wildcards.seed} --model {input.model}"
        " --train {input.train} --dev {input.dev} --hardware {params.hardware:q} --output {output} > {log} 2>&1"


rule distill:
    input:
        script="workflow/scripts/distill.py",
        config="results/{experiment}/methods/{method}/config.json",
        model=student_of,
        train=train_tokens_of,
        dev=dev_tokens_of,
        teacher=teacher_of,
        cache=cache_of,
        alignment=alignment_of,
        spelling=spelling_of,
        vocabulary=vocabulary_of,
    output:
        "results/{experiment}/methods/{method}/seed{seed}/model/manifest.json",
    log:
        "logs/distill/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "results/benchmarks/distill/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        method=one_of(VARIANTS - FINE_TUNED),
    conda:
        "../envs/kdbench.yaml"
    threads: HARDWARE.threads
    resources:
        gpu=gpus,
        mem_mb=memory,
        disk_mb=disk,
        runtime=runtime,
    params:
        launch=on_devices,
        hardware=hardware,
        cache=lambda wildcards, input: f"--teacher-cache {input.cache}" if input.cache else "",
        text=lambda wildcards, input: " ".join(
            f"--{name} {input[name]}" for name in ("alignment", "spelling", "vocabulary") if input[name]
        ),
    shell:
        "{params.launch} {input.script} --config {input.config} --seed {wildcards.seed} --model {input.model}"
        " --train {input.train} --dev {input.dev} --teacher {input.teacher} {params.cache} {params.text}"
        " --hardware {params.hardware:q} --output {output} > {log} 2>&1"


rule generate_answers:
    """What the teacher writes to the training prompts, for methods that learn from its texts."""
    input:
        script="workflow/scripts/generate_answers.py",
        config="results/{experiment}/methods/{method}/config.json",
        teacher=teacher_of,
        records=train_records_of,
    output:
        "results/{experiment}/methods/{method}/answers/manifest.json",
    log:
        "logs/generate_answers/{experiment}/{method}.log",
    benchmark:
        "results/benchmarks/generate_answers/{experiment}/{method}.tsv"
    wildcard_constraints:
        method=one_of(ANSWERED),
    conda:
        "../envs/kdbench.yaml"
    threads: HARDWARE.threads
    resources:
        gpu=lambda wildcards: min(1, gpus(wildcards)),
        mem_mb=memory,
        runtime=runtime,
    params:
        launch=on_device,
        hardware=hardware,
    shell:
        "{params.launch} {input.script} --config {input.config} --model {input.teacher} --records {input.records}"
        " --hardware {params.hardware:q} --output {output} > {log} 2>&1"


rule tokenize_answers:
    """Prompts are cut for student and teacher together, as for every other method of the experiment."""
    input:
        script="workflow/scripts/tokenize_data.py",
        records="results/{experiment}/methods/{method}/answers/manifest.json",
        models=pair_of,
    output:
        "results/{experiment}/methods/{method}/tokens/manifest.json",
    log:
        "logs/tokenize_answers/{experiment}/{method}.log",
    benchmark:
        "results/benchmarks/tokenize_answers/{experiment}/{method}.tsv"
    wildcard_constraints:
        method=one_of(ANSWERED),
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        text=text_settings,
    shell:
        "python {input.script} --records {input.records} --models {input.models} --text {params.text:q}"
        " --output {output} > {log} 2>&1"
