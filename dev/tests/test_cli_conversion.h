// Conversions with --steps 0: every tensor comes back; a part of test_cli.c, whose helpers it uses.

static void test_conversion(void) {
    static const char *const names[] = { "gqa", "tied", "dense", "wide", "parallel", "skewed" };
    for (int i = 0; i < 6; i++) {
        char *source = xasprintf("%s/%s", getenv("F"), names[i]);
        good("rm -rf $T/c1 $T/c2 $T/c3; exec $B --model $F/%s --steps 0 --save-dtype source --out "
             "$T/c1",
             names[i]);
        good("exec $B --model $F/%s --steps 0 --save-dtype source --save-layout fused --out $T/c2",
             names[i]);
        good("exec $B --model $T/c2/checkpoints/step_0 --steps 0 --save-dtype source --out $T/c3");
        SafeTensors s = safetensors_open_folder(source);
        SafeTensors fused = safetensors_open_folder(at("c2/checkpoints/step_0"));
        int is_fused = 0;
        int has_fused = 0;
        for (int k = 0; k < s.n; k++) is_fused |= s.tensor[k].n_dims == 3;
        for (int k = 0; k < fused.n; k++) has_fused |= fused.tensor[k].n_dims == 3;
        safetensors_close(&s);
        safetensors_close(&fused);
        check(has_fused &&
                  !tensors_differ(is_fused ? at("c2/checkpoints/step_0")
                                           : at("c1/checkpoints/step_0"),
                                  source) &&
                  !tensors_differ(at("c1/checkpoints/step_0"), at("c3/checkpoints/step_0")),
              "%s: --steps 0 --save-dtype source gives back every tensor byte for byte, through "
              "the fused layout too",
              names[i]);
        free(source);
    }
    SafeTensors state = safetensors_open(at("c1/checkpoints/step_0/optimizer.safetensors"));
    check(state.n == 0, "a conversion has no optimizer state: a file without a tensor");
    safetensors_close(&state);
    good("exec $B --model $F/gqa --steps 0 --save-dtype bf16 --out $T/half");
    good("exec $B --model $T/half/checkpoints/step_0 --steps 0 --save-dtype source --out $T/half2");
    good("exec $B --model $T/half/checkpoints/step_0 --steps 0 --save-dtype f32 --out $T/half3");
    good("exec $B --model $T/half3/checkpoints/step_0 --steps 0 --save-dtype bf16 --out $T/half4");
    check(!tensors_differ(at("half/checkpoints/step_0"), at("half2/checkpoints/step_0")) &&
              !tensors_differ(at("half/checkpoints/step_0"), at("half4/checkpoints/step_0")) &&
              tensors_differ(at("half/checkpoints/step_0"), at("half3/checkpoints/step_0")),
          "BF16: back as it was with --save-dtype source, and by way of F32");
}
