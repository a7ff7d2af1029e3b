"""Settings: which source wins, and what is refused."""

import pytest

from idea_jax.config.reading import build, parse, resolve, to_yaml
from idea_jax.config.settings import (
    BASIS_DEFAULTS,
    ENHANCER_DEFAULTS,
    PROFILE_DEFAULTS,
    ConfigError,
    SampleConfig,
    TrainConfig,
    settings_of,
)
from idea_jax.sampling.settings import BatchConfig

REQUIRED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
SAMPLE = ["--pretrained_model_name_or_path", "m", "--identity", "i", "--prompt", "{}"]


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_flag_wins_over_yaml_over_profile_over_default(tmp_path):
    config = write(tmp_path, "profile: cross_init\nreg_weight: 0.5\nmax_train_steps: 7\n")
    cfg = parse(TrainConfig, [*REQUIRED, *config, "--max_train_steps", "9"])
    assert cfg.max_train_steps == 9  # flag
    assert cfg.reg_weight == 0.5  # YAML over profile
    assert cfg.learning_rate == PROFILE_DEFAULTS["cross_init"]["learning_rate"]
    assert cfg.train_batch_size == 8  # field default


def test_center_crop_is_another_name_for_two_crops(tmp_path):
    """`--center_crop` of diffusers and `--crop` are one setting; the later source wins."""

    def crop(*flags):
        return parse(TrainConfig, [*REQUIRED, *flags]).crop

    assert (crop(), crop("--profile", "official")) == ("center", "none")
    assert (crop("--no-center_crop"), crop("--profile", "official", "--center_crop")) == (
        "none",
        "center",
    )
    old = write(tmp_path, "center_crop: false\n")
    assert (crop(*old), crop(*old, "--crop", "face")) == ("none", "face")
    assert crop(*old, "--center_crop") == "center"
    assert parse(TrainConfig, REQUIRED).center_crop
    with pytest.raises(ConfigError, match="center_crop must be bool, got 1"):
        crop(*write(tmp_path, "center_crop: 1\n"))


def test_what_a_program_alone_has_is_told_before_what_it_shares():
    names = [spec.name for spec in settings_of(BatchConfig)]
    assert names[:3] == ["pretrained_model_name_or_path", "out", "jobs"] and names[-1] == "seed"
    assert len(set(names)) == len(names)


def test_a_data_set_stands_in_for_the_folder():
    flags = ["--pretrained_model_name_or_path", "m", "--dataset", "celeb_a", "--dataset_dir", "d"]
    cfg = parse(TrainConfig, [*flags, "--identities", "0:64", "--pictures_per_person", "1"])
    assert (cfg.train_data_dir, cfg.identities, cfg.pictures_per_person) == (None, "0:64", 1)


def test_flag_chooses_the_profile_whose_defaults_apply(tmp_path):
    config = write(tmp_path, "profile: paper\n")
    cfg = parse(TrainConfig, [*REQUIRED, *config, "--profile", "textual_inversion"])
    assert (cfg.learning_rate, cfg.kv, cfg.scale_lr) == (5e-4, "none", False)


def test_without_a_regulariser_the_profile_has_no_weight(tmp_path):
    cfg = parse(TrainConfig, [*REQUIRED, "--regulariser", "none"])
    assert cfg.reg_weight == 0
    assert parse(TrainConfig, write(tmp_path, to_yaml(cfg))) == cfg
    for regulariser in ("exact", "truncated", "euclidean"):
        assert parse(TrainConfig, [*REQUIRED, "--regulariser", regulariser]).reg_weight == 8e-4


def test_commands_of_the_original_readme_parse():
    cfg = parse(
        TrainConfig,
        "--save_steps 100 --only_save_embeds --placeholder_token <00011> --train_batch_size 8 "
        "--scale_lr --n_persudo_tokens 2 --reg_weight 8e-4 --learning_rate 0.0015 "
        "--max_train_step 320 --train_data_dir d --celeb_path c --pretrained_model_name_or_path m "
        "--output_dir o".split(),
    )
    assert (cfg.max_train_steps, cfg.n_pseudo_tokens, cfg.only_save_embeds) == (320, 2, True)
    assert cfg.rates()["pseudo_tokens"] == pytest.approx(0.012)
    cfg = parse(
        SampleConfig,
        [
            *"--pretrained_model_name_or_path m --num_inference_steps 50 --save_dir s".split(),
            *"--learned_embedding_path o/learned_embeds.bin --num_images_per_prompt 32".split(),
            "--n_iter",
            "1",
            "--prompt",
            "{} wearing an oversized sweater",
        ],
    )
    assert (cfg.prompt, cfg.num_images_per_prompt) == (["{} wearing an oversized sweater"], 32)


@pytest.mark.parametrize("profile", PROFILE_DEFAULTS)
def test_shipped_config_names_its_profile_and_has_a_command(profile, request):
    path = request.config.rootpath / "configs" / f"{profile}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# train_jax.py --config configs/{profile}.yaml ")
    cfg = parse(TrainConfig, [*lines[0].split()[2:]])
    assert cfg.profile == profile
    parts = {"paper": 4, "official": 2}.get(profile, 1)
    assert len(cfg.rates()) == parts


def test_resolved_config_reads_back_to_the_same_run(tmp_path):
    cfg = parse(TrainConfig, [*REQUIRED, "--validation_prompt", "a {}", "ünï {}", "--kv", "full"])
    assert parse(TrainConfig, write(tmp_path, to_yaml(cfg))) == cfg


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("max_train_stepz: 3", "did you mean 'max_train_steps'"),
        ("max_train_steps: three", "max_train_steps in .* must be int, got 'three'"),
        ("max_train_steps: true", "must be int, got True"),
        ("learning_rate: 1e-4", "write 1.0e-4"),
        ("validation_prompt: a photo", "must be a list of str"),
        ("profile: papper", "must be one of paper, official"),
        ("seed: 1\nseed: 2", "repeated key seed"),
        ("- a\n- b", "must hold `key: value` lines, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path, yaml, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, [*REQUIRED, *write(tmp_path, yaml)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--profile cross_init --kv full", "only the paper profile trains keys"),
        ("--profile official --kv_learning_rate 1", "--kv_learning_rate has no effect"),
        ("--profile cross_init --face_model f", "--face_model has no effect"),
        ("--profile textual_inversion --reg_weight 1", "has no regulariser of its own"),
        ("--regulariser none --reg_weight 1", "--reg_weight 1 has no effect with --regulariser no"),
        ("--regulariser exact --reg_weight 0", "--regulariser exact has no effect with a weight"),
        ("--profile textual_inversion --regulariser exact", "exact has no effect with a weight of"),
        ("--initialize_tokens a b --celeb_path c", "either --initialize_tokens or --celeb_path"),
        ("--train_batch_size 0", "must be greater than 0, got 0"),
        ("--learning_rate -1", "must not be negative, got -1"),
        ("--adam_beta1 1", r"must lie in \[0, 1\)"),
        ("--kv none --kv_learning_rate 0.5", "--kv_learning_rate has no effect with --kv none"),
        ("--kv full --kv_rank 8", "--kv_rank has no effect with --kv full"),
        ("--logging_dir ../logs", "a folder inside output_dir"),
        ("--logging_dir /logs", "a folder inside output_dir"),
        ("--profile cross_init --face_select left", "--face_select has no effect.*--crop face"),
        ("--face_model f --face_model_dir d", "either --face_model or --face_model_dir"),
        ("--face_embeddings f --face_select left", "--face_select has no effect with --face_emb"),
        ("--face_embeddings f --pre_aligned", "--pre_aligned has no effect with --face_emb"),
        ("--crop_margin 1.2", "--crop_margin has no effect without --crop face"),
        ("--crop face --crop_margin 5", "crop_margin must be from 0.5 to 4, got 5"),
        ("--crop face --pre_aligned", "--crop face has no effect on --pre_aligned"),
        ("--crop face --center_crop", "center_crop true means crop center, which contradicts"),
        ("--profile cross_init --crop face --drop_outliers", "--drop_outliers has no effect"),
        ("--dataset celeb_a --dataset_dir d", "either --train_data_dir or --dataset"),
        ("--dataset_dir d", "--dataset and --dataset_dir belong together"),
        ("--mesh 4", "identity=N,data=M, such as identity=4,data=2, or auto, got '4'"),
        ("--mesh data=0", "--mesh must be"),
        ("--mesh data=2,data=2", "--mesh must be"),
        ("--mesh identity=2,", "--mesh must be"),
        ("--mesh identity=2 --shard_frozen", "--shard_frozen splits.*data=N"),
        ("--shard_frozen", "--shard_frozen splits"),
        ("--identities_per_step 0", "must be greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, [*REQUIRED, *flags.split()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learned_embedding_path", "x"], "exactly one of --identity"),
        (["--prompt_file", "x"], "exactly one of --prompt"),
        (["--guidance_rescale", "2"], "guidance_rescale must lie between 0 and 1"),
        (
            ["--guidance_rescale", "0.7", "--guidance_scale", "0"],
            "no effect with --guidance_scale 0",
        ),
        (["--eta", "1.5"], "between 0 and 1"),
        (["--guidance_scale", "1", "--negative_prompt", "x"], "--negative_prompt has no effect"),
        (["--negative_prompt", "{} ugly"], "{} can stand in --prompt only"),
        (["--guidance_interval", "0.9", "0.2"], "two numbers from 0 to 1"),
        (["--guidance_interval", "0.5"], "two numbers from 0 to 1"),
        (["--original_size", "0", "64"], "original_size must be two numbers of pixels from 1 to"),
        # The network is told of numbers of 32 bits.
        (["--original_size", "64", "3000000000"], "of pixels from 1 to 1000000, got 64 3000000000"),
        (["--crop_top_left", "5"], "crop_top_left must be two numbers of pixels from 0 to"),
        (["--compile_cache", ""], "must be a folder, or off"),
        (["--compile_cache", "off "], "must be a folder, or off"),
        (["--compile_cache", "OFF"], "must be a folder, or off"),
        (["--guidance_interval", "0", "1", "--guidance_scale", "1"], "interval has no effect"),
    ],
)
def test_sample_settings_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(SampleConfig, [*SAMPLE, *flags])


def test_sizes_of_the_mesh_are_read():
    def shape(text):
        return parse(TrainConfig, [*REQUIRED, "--mesh", text]).mesh_shape()

    assert shape("identity=4,data=2") == shape("data=2,identity=4") == {"identity": 4, "data": 2}
    assert shape("data=8") == {"identity": 1, "data": 8}
    assert parse(TrainConfig, REQUIRED).mesh_shape() is None


def test_lists_may_be_given_in_parts():
    cfg = parse(SampleConfig, [*SAMPLE, "--identity", "b=x", "c", "--prompt", "{} too"])
    assert cfg.identity == ["i", "b=x", "c"] and cfg.prompt == ["{}", "{} too"]


def test_preset_gives_defaults_that_flags_override():
    fast = [*SAMPLE, "--preset", "fast"]
    cfg = parse(SampleConfig, fast)
    assert (cfg.scheduler, cfg.num_inference_steps) == ("dpmpp_2m", 20)
    assert cfg.guidance_interval == [0.2, 0.9]
    assert parse(SampleConfig, [*fast, "--guidance_scale", "1"]).guidance_interval is None
    everywhere = parse(SampleConfig, [*fast, "--guidance_interval", "0", "1"])
    assert everywhere.guidance_interval == [0.0, 1.0]
    own = parse(SampleConfig, [*fast, "--num_inference_steps", "8"])
    assert (own.scheduler, own.num_inference_steps) == ("dpmpp_2m", 8)
    assert parse(SampleConfig, SAMPLE).num_inference_steps == 50
    fast = [*REQUIRED, "--preset", "fast"]
    assert parse(TrainConfig, REQUIRED).early_stopping == 0
    assert parse(TrainConfig, fast).early_stopping == 2
    assert parse(TrainConfig, [*fast, "--early_stopping", "5"]).early_stopping == 5
    slow, quick = (parse(TrainConfig, flags) for flags in (REQUIRED, fast))
    assert (slow.max_train_steps, quick.max_train_steps) == (320, 160)
    scaled = (spec.name for spec in settings_of(TrainConfig) if spec.metadata["fast_times"])
    rates = [name for name in scaled if name != "max_train_steps"]
    assert len(rates) == 4 and slow.kv_learning_rate == 1e-4
    for name in rates:
        assert getattr(quick, name) == 2 * getattr(slow, name)
    own = parse(TrainConfig, [*fast, "--learning_rate", "0.5"])
    assert (own.max_train_steps, own.learning_rate, own.kv_learning_rate) == (160, 0.5, 2e-4)
    # Whoever names the steps has chosen the rates for them.
    own = parse(TrainConfig, [*fast, "--max_train_steps", "100"])
    assert (own.max_train_steps, own.kv_learning_rate) == (100, 1e-4)
    # A profile without an adapter has no rate for one.
    assert parse(TrainConfig, [*fast, "--profile", "cross_init"]).adapter_learning_rate is None
    with pytest.raises(ConfigError, match="no effect without --early_stopping"):
        parse(TrainConfig, [*REQUIRED, "--evaluation_steps", "10"])


def test_preset_is_as_strong_as_where_it_stands(tmp_path):
    """As a flag it wins over a file, such as one that a run has written with all its settings."""
    file = tmp_path / "config.yaml"
    file.write_text("num_inference_steps: 50\nscheduler: ddim\n")
    from_file = [*SAMPLE, "--config", str(file)]
    cfg = parse(SampleConfig, [*from_file, "--preset", "fast"])
    assert (cfg.scheduler, cfg.num_inference_steps) == ("dpmpp_2m", 20)
    cfg = parse(SampleConfig, [*from_file, "--preset", "fast", "--num_inference_steps", "9"])
    assert (cfg.scheduler, cfg.num_inference_steps) == ("dpmpp_2m", 9)
    file.write_text("num_inference_steps: 30\npreset: fast\n")
    cfg = parse(SampleConfig, from_file)
    assert (cfg.scheduler, cfg.num_inference_steps) == ("dpmpp_2m", 30)


def test_preset_scales_what_a_file_says_once(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("max_train_steps: 81\nlearning_rate: 0.25\n")
    again = [*REQUIRED, "--config", str(file), "--preset", "fast"]
    cfg = parse(TrainConfig, again)
    assert (cfg.max_train_steps, cfg.learning_rate, cfg.early_stopping) == (40, 0.5, 2)
    # As a run with the preset has written it: its numbers are the result already.
    file.write_text("preset: fast\nmax_train_steps: 40\nlearning_rate: 0.5\n")
    for flags in (again, again[:-2]):
        cfg = parse(TrainConfig, flags)
        assert (cfg.max_train_steps, cfg.learning_rate, cfg.early_stopping) == (40, 0.5, 2)
    file.write_text("max_train_steps: 1\n")
    assert parse(TrainConfig, again).max_train_steps == 1


FIXED = {"n_pseudo_tokens": 3, "beta": 0.4}  # what an enhancer decides


def test_with_a_shared_enhancer_what_nobody_gave_is_another(tmp_path):
    def values(cfg):
        return {name: getattr(cfg, name) for name in ENHANCER_DEFAULTS}

    plain = parse(TrainConfig, REQUIRED)
    cfg = resolve(plain, FIXED)
    rate = "adapter_learning_rate"  # of a part that is not among the default ones
    ours = {**ENHANCER_DEFAULTS, **BASIS_DEFAULTS}
    assert values(cfg) == {name: ours[name] for name in ENHANCER_DEFAULTS} | {rate: None}
    assert (cfg.regulariser, cfg.reg_weight) == ("none", 0)
    # Tokens that move freely are held by the regulariser, and whoever asks for one has it.
    for flags in (["--token_basis", "none"], ["--regulariser", "exact"], ["--reg_weight", "1e-3"]):
        held = resolve(parse(TrainConfig, [*REQUIRED, *flags]), FIXED)
        assert held.regulariser in (None, "exact") and held.reg_weight > 0
        assert held.learning_rate == (1e-2 if "none" in flags else 0.07)
    older = resolve(plain, {**FIXED, "token_basis": "none"})  # an enhancer without a basis
    assert (older.learning_rate, older.token_basis, older.regulariser) == (1e-2, "none", None)
    with pytest.raises(ConfigError, match="token_basis is names, and the shared ID-Enhancer is"):
        named = parse(TrainConfig, [*REQUIRED, "--token_basis", "names"])
        resolve(named, {**FIXED, "token_basis": "none"})
    assert (cfg.n_pseudo_tokens, cfg.max_train_steps, cfg.kv) == (3, 25, "low_rank")
    assert set(cfg.rates()) == {"pseudo_tokens", "enhanced", "kv"}
    assert resolve(plain, None) == parse(TrainConfig, [*REQUIRED, "--enhancer", "none"])
    # Who says something is heard, in a file and by a flag.
    file = write(tmp_path, "max_train_steps: 320\nscale_lr: true\n")
    given = resolve(parse(TrainConfig, [*REQUIRED, *file, "--learning_rate", "0.5"]), FIXED)
    assert (given.max_train_steps, given.scale_lr, given.learning_rate) == (320, True, 0.5)
    assert given.lr_scheduler == "cosine"
    wide = parse(TrainConfig, [*REQUIRED, "--train_parts", "tokens,enhanced,kv,adapter"])
    assert resolve(wide, FIXED).adapter_learning_rate == ENHANCER_DEFAULTS[rate]
    for flags in (["--train_parts", "enhanced,tokens"], ["--kv", "none"]):
        narrow = resolve(parse(TrainConfig, [*REQUIRED, *flags]), FIXED)
        assert (narrow.kv, narrow.kv_learning_rate) == ("none", None)
        assert set(narrow.own_parts()) == {"tokens", "enhanced"}
    # And what a run has written is the same run again.
    for cfg in (resolve(plain, FIXED), narrow, given):
        again = parse(TrainConfig, write(tmp_path, to_yaml(cfg)))
        assert to_yaml(resolve(again, FIXED)) == to_yaml(cfg)


def test_fast_takes_no_step_with_a_shared_enhancer(tmp_path):
    fast = [*REQUIRED, "--preset", "fast"]
    cfg = resolve(parse(TrainConfig, fast), FIXED)
    assert (cfg.max_train_steps, cfg.early_stopping, cfg.learning_rate) == (0, 0, 0.07)
    assert resolve(parse(TrainConfig, fast), None).max_train_steps == 160
    file = write(tmp_path, "max_train_steps: 81\n")  # the flag is stronger
    assert resolve(parse(TrainConfig, [*fast, *file]), FIXED).max_train_steps == 0
    assert (
        resolve(parse(TrainConfig, [*fast, "--max_train_steps", "9"]), FIXED).max_train_steps == 9
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--enhancer f --profile cross_init", "--enhancer has no effect with profile 'cross_init'"),
        ("--train_parts tokens,enhanced --profile official", "--train_parts has no effect"),
        ("--train_parts tokens,enhanced --enhancer none", "without a shared ID-Enhancer"),
        ("--self_contained --enhancer none", "--self_contained has no effect without a shared"),
        ("--enhanced_learning_rate 1 --enhancer none", "--enhanced_learning_rate has no effect"),
        ("--max_train_steps 0 --enhancer none", "--max_train_steps 0 writes what a shared"),
        ("--max_train_steps 0 --profile cross_init", "profile 'cross_init' has none"),
        ("--max_train_steps -1", "must not be negative"),
        ("--max_train_steps 0 --validation_prompt {}", "--validation_prompt has no effect with"),
        ("--max_train_steps 0 --resume_from_checkpoint latest", "--resume_from_checkpoint has no"),
        ("--train_parts tokens,face", "tokens, enhanced, kv, adapter.*'tokens,face'"),
        ("--train_parts tokens,tokens,enhanced", "each once"),
        ("--train_parts tokens,kv", "must name tokens and enhanced"),
        ("--lr_warmup_steps 320", "must be less than --max_train_steps 320"),
        ("--lr_warmup_steps -1", "must not be negative"),
        ("--lr_num_cycles 0", "must be greater than 0"),
        ("--lr_num_cycles 2", "no effect with --lr_scheduler constant: it is of cosine_with"),
    ],
)
def test_settings_of_a_shared_enhancer_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, [*REQUIRED, *flags.split()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--enhancer_learning_rate 1", "--enhancer_learning_rate has no effect where a shared"),
        ("--celeb_path c", "--celeb_path has no effect where a shared"),
        ("--initialize_tokens a", "--initialize_tokens has no effect where a shared"),
        ("--n_pseudo_tokens 4", "--n_pseudo_tokens is 4, and the shared ID-Enhancer is for 3"),
        ("--adapter_learning_rate 1", "--adapter_learning_rate has no effect without adapter"),
        ("--train_parts tokens,enhanced --kv full", "--kv has no effect without kv"),
        ("--train_parts tokens,enhanced,kv --kv none", "--kv none contradicts"),
        ("--lr_warmup_steps 25", "must be less than --max_train_steps 25"),
    ],
)
def test_settings_that_do_not_fit_with_a_shared_enhancer_are_refused(flags, message):
    cfg = parse(TrainConfig, [*REQUIRED, *flags.split()])
    with pytest.raises(ConfigError, match=message):
        resolve(cfg, FIXED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--identity i --photo p", "exactly one of --identity, --learned_embedding_path and"),
        ("", "exactly one of --identity, --learned_embedding_path and --photo"),
        ("--identity i --face_select left", "--face_select has no effect without --photo"),
        ("--photo p --enhancer none", "--photo needs a shared ID-Enhancer"),
        ("--photo p --face_model f --face_model_dir d", "either --face_model or --face_model_dir"),
        ("--photo p --face_embeddings f --pre_aligned", "--pre_aligned has no effect with --face"),
    ],
)
def test_settings_of_photos_to_draw_from_are_looked_at(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(SampleConfig, [*SAMPLE[:2], *SAMPLE[4:], *flags.split()])


def test_missing_settings_are_listed():
    with pytest.raises(ConfigError, match="missing: --pretrained_model_name_or_path"):
        build(TrainConfig, {}, {})
    with pytest.raises(ConfigError, match="missing: --train_data_dir, or --dataset"):
        build(TrainConfig, {}, {"pretrained_model_name_or_path": "m"})


def test_abbreviated_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, [*REQUIRED, "--max_train", "3"])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "--max_train" in told
    assert "--help" in told and len(told.splitlines()) == 2, "the reason is buried in the usage"


ORIGINAL = (
    "--allow_tf32 --center_crop --dataloader_num_workers 2 --device cuda "
    "--enable_xformers_memory_efficient_attention --gradient_accumulation_steps 4 "
    "--gradient_checkpointing --learnable_property object --local_rank -1 --lr_num_cycles 1 "
    "--no_safe_serialization --num_train_epochs 100 --repeats 100 --save_as_full_pipeline "
    "--tokenizer_name t --validation_epochs 50 --validation_prompt_file p.txt"
).split()


def test_flags_of_the_original_scripts_are_accepted_and_say_why_they_do_nothing(caplog):
    cfg = parse(TrainConfig, [*REQUIRED, *ORIGINAL, "--train_batch_size", "2"])
    with_meaning = {"--center_crop", "--gradient_accumulation_steps", "--validation_prompt_file"}
    with_meaning |= {"--lr_num_cycles", "--tokenizer_name"}
    said = [record.getMessage() for record in caplog.records]
    for flag in {flag for flag in ORIGINAL if flag.startswith("--")} - with_meaning:
        (line,) = [line for line in said if line.startswith(f"{flag} is ignored: ")]
        assert len(line) > len(flag) + 30
    assert len(said) == len([flag for flag in ORIGINAL if flag.startswith("--")]) - 5
    # Those with a meaning do it.
    assert (cfg.crop, cfg.validation_prompt_file, cfg.train_batch_size) == ("center", "p.txt", 8)
    given = ["--center_crop", "--validation_prompt_file", "p.txt", "--tokenizer_name"]
    given.append(ORIGINAL[ORIGINAL.index("--tokenizer_name") + 1])
    assert cfg == parse(TrainConfig, [*REQUIRED, *given])
    assert parse(SampleConfig, [*SAMPLE, "--device", "cuda:0"]) == parse(SampleConfig, SAMPLE)


def test_a_command_with_every_flag_of_diffusers_textual_inversion_parses():
    flags = """
        --save_steps 500 --save_as_full_pipeline --num_vectors 1 --revision main --variant fp16
        --pretrained_model_name_or_path M --tokenizer_name T --train_data_dir D
        --placeholder_token <a> --initializer_token toy --learnable_property object --repeats 100
        --output_dir O --seed 1 --resolution 512 --center_crop --train_batch_size 16
        --num_train_epochs 100 --max_train_steps 5000 --gradient_accumulation_steps 2
        --gradient_checkpointing --learning_rate 1e-4 --scale_lr --lr_scheduler cosine_with_restarts
        --lr_warmup_steps 500 --lr_num_cycles 2 --dataloader_num_workers 0 --adam_beta1 0.9
        --adam_beta2 0.999 --adam_weight_decay 1e-2 --adam_epsilon 1e-8 --push_to_hub --hub_token T
        --hub_model_id X --logging_dir logs --mixed_precision bf16 --allow_tf32
        --report_to tensorboard --validation_prompt {} --num_validation_images 4
        --validation_steps 100 --validation_epochs 50 --local_rank -1 --checkpointing_steps 500
        --checkpoints_total_limit 3 --resume_from_checkpoint latest
        --enable_xformers_memory_efficient_attention --no_safe_serialization
    """.split()
    cfg = parse(TrainConfig, [*flags, "--publish_consent"])
    assert (cfg.lr_scheduler, cfg.lr_num_cycles) == ("cosine_with_restarts", 2)
    assert cfg.train_batch_size == 32


def test_accumulated_steps_are_a_larger_batch_in_every_rate():
    cfg = parse(TrainConfig, [*REQUIRED, "--gradient_accumulation_steps", "3", "--scale_lr"])
    same = parse(TrainConfig, [*REQUIRED, "--train_batch_size", "24", "--scale_lr"])
    assert cfg == same and cfg.rates() == same.rates()
    with pytest.raises(ConfigError, match="gradient_accumulation_steps must be greater than 0"):
        parse(TrainConfig, [*REQUIRED, "--gradient_accumulation_steps", "0"])
    with pytest.raises(ConfigError, match="either --validation_prompt or --validation_prompt_file"):
        flags = ["--validation_prompt", "{}", "--validation_prompt_file", "p.txt"]
        parse(TrainConfig, [*REQUIRED, *flags])
