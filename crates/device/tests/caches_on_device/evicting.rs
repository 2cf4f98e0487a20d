//! Methods that drop tokens: the same tokens stay as on the host.

use super::*;

#[test]
fn first_and_recent_tokens() {
    check("sinks", &SMALL);
    check("{ method = \"sinks\", sinks = 3, recent = 17 }", &ODD);
    check("{ method = \"sinks\", sinks = 0, recent = 40, dtype = \"f32\" }", &WIDE);
    check("{ method = \"sinks\", sinks = 5, recent = 30 }", &ModelShape { window: Some(20), ..SMALL });
}

#[test]
fn heavy_hitters() {
    check("h2o", &SMALL);
    check("{ method = \"h2o\", recent = 9, heavy = 11, dtype = \"f32\" }", &ODD);
    check("{ method = \"h2o\", recent = 0.3, heavy = 0.33 }", &WIDE);
    check("{ method = \"h2o\", recent = 12, heavy = 30 }", &ModelShape { softcap: Some(3.0), ..SMALL });
}

#[test]
fn what_the_prompts_last_tokens_look_at() {
    check("snapkv", &SMALL);
    check("{ method = \"snapkv\", kept = 40, window = 8, kernel = 3 }", &ODD);
    check("{ method = \"snapkv\", kept = 0.5, window = 40, kernel = 9 }", &WIDE);
}
