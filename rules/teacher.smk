localrules:
    configure_teacher,


rule configure_teacher:
    """Write down all that decides a teacher: what its training, its cache and its scores depend on."""
    input:
        script="workflow/scripts/configure.py",
    output:
        "results/teachers/{teacher}/config.json",
    log:
        "logs/configure_teacher/{teacher}.log",
    benchmark:
        "results/benchmarks/configure_teacher/{teacher}.tsv"
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        identity=teacher_identity,
    shell:
        "python {input.script} --identity {params.identity:q} --output {output} > {log} 2>&1"


rule sft_teacher:
    input:
        script="workflow/scripts/sft.py",
        config="results/teachers/{teacher}/config.json",
        model=teacher_base_of,
        tokens=teacher_tokens_of,
    output:
        "results/teachers/{teacher}/model/manifest.json",
    log:
        "logs/sft_teacher/{teacher}.log",
    benchmark:
        "results/benchmarks/sft_teacher/{teacher}.tsv"
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
        "{params.launch} {input.script} --config {input.config} --model {input.model}"
        " --train {input.tokens[0]} --dev {input.tokens[1]} --hardware {params.hardware:q} --output {output} > {log} 2>&1"


rule cache_teacher:
    """The teacher runs once; what every method, objective, seed and epoch reads afterwards is this."""
    input:
        script="workflow/scripts/cache_teacher.py",
        config="results/teachers/{teacher}/config.json",
        model=lambda wildcards: tuned_teacher(wildcards.teacher),
        tokens=cache_tokens_of,
    output:
        "results/teachers/{teacher}/cache/{student}/{dataset}/manifest.json",
    log:
        "logs/cache_teacher/{teacher}/{student}/{dataset}.log",
    benchmark:
        "results/benchmarks/cache_teacher/{teacher}/{student}/{dataset}.tsv"
    wildcard_constraints:
        student=one_of(CONFIG.models),
    conda:
        "../envs/kdbench.yaml"
    threads: HARDWARE.threads
    resources:
        gpu=lambda wildcards: min(1, gpus(wildcards)),
        mem_mb=memory,
        disk_mb=disk,
        runtime=runtime,
    params:
        dtype=cache_dtype,
        launch=on_device,
        hardware=hardware,
    shell:
        "{params.launch} {input.script} --model {input.model} --tokens {input.tokens} --dtype {params.dtype}"
        " --hardware {params.hardware:q} --output {output} > {log} 2>&1"
