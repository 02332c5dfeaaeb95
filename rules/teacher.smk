localrules:
    configure_teacher,
    join_cache,


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


for job in range(1, HARDWARE.cache_jobs + 1):

    rule:
        """The teacher runs once; what every method, objective, seed and epoch reads afterwards is this.

        A cache has the same parts however many jobs write them: the number of jobs changes no rule's input, hence is no reason for a rerun.
        """
        name:
            "cache_teacher" if job == 1 else f"cache_teacher_{job}"
        input:
            script="workflow/scripts/cache_teacher.py",
            config="results/teachers/{teacher}/config.json",
            model=lambda wildcards: tuned_teacher(wildcards.teacher),
            tokens=cache_tokens_of,
        output:
            cache_parts(job, HARDWARE.cache_jobs),
        log:
            f"logs/cache_teacher/{{teacher}}/{{student}}/{{dataset}}.{job}.log",
        benchmark:
            f"results/benchmarks/cache_teacher/{{teacher}}/{{student}}/{{dataset}}.{job}.tsv"
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
            folder=cache_folder,
            parts=numbers_of_parts,
        shell:
            "{params.launch} {input.script} --model {input.model} --tokens {input.tokens} --dtype {params.dtype}"
            " --parts {params.parts} --hardware {params.hardware:q} --output {params.folder} > {log} 2>&1"


rule join_cache:
    input:
        script="workflow/scripts/join_cache.py",
        parts=cache_parts(1, 1),
    output:
        f"{CACHE}/manifest.json",
    log:
        "logs/join_cache/{teacher}/{student}/{dataset}.log",
    benchmark:
        "results/benchmarks/join_cache/{teacher}/{student}/{dataset}.tsv"
    wildcard_constraints:
        student=one_of(CONFIG.models),
    conda:
        "../envs/kdbench.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=30,
    shell:
        "python {input.script} --output {output} > {log} 2>&1"
