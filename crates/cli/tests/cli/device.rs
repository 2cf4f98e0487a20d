//! Models on a device: the emulated one, which every machine has.

use crate::accuracy::ACCURACY;
use crate::room::Room;
use crate::{Place, untimed};

#[test]
fn a_device_writes_what_the_host_writes() {
    let room = Room::new();
    let model = room.model(false);
    for cache in ["full", "minicache", "kivi-8", "h2o", "fp8", "xkv"] {
        let args = ["generate", "--model", &model, "--prompt", "w5 w6 w7 w8", "--max-new-tokens", "6"];
        let args = [&args[..], &["--weights", "f32", "--cache", cache]].concat();
        let on_device = room.run(&[&args[..], &["--device", "emulated:0"]].concat());
        assert_eq!(room.done(&args), crate::text(&on_device.stdout), "{cache}");
        // What has no kernels is said once, and goes on.
        let said = crate::text(&on_device.stderr);
        assert_eq!(
            said.matches("has no kernels for a device").count(),
            usize::from(["fp8", "xkv"].contains(&cache)),
            "{said}"
        );
    }
    room.wrong(&["models", "--device", "cpu,cuda"], &["not on both"]);
    let driver = ["/usr/lib", "/usr/lib64", "/usr/local/nvidia/lib64"];
    if !driver.iter().any(|dir| std::path::Path::new(dir).join("libcuda.so.1").exists()) {
        room.wrong(
            &["generate", "--model", &model, "--prompt", "w5", "--device", "cuda:0"],
            &["--device cpu"],
        );
    }
}

#[test]
fn an_experiment_runs_on_a_device() {
    let place = Place::new();
    place.done(&["run", "e.toml", "--results", "host", "--set", "model.weights=f32"]);
    place.done(&[
        "run",
        "e.toml",
        "--results",
        "device",
        "--set",
        "model.weights=f32",
        "--device",
        "emulated:0",
    ]);
    let [host, device] =
        ["host", "device"].map(|name| untimed(&place.path(&format!("{name}/sample/e/cells.csv"))));
    assert_eq!(host.len(), device.len());
    let kl = host[0].iter().position(|name| name == "kl").unwrap();
    for (host, device) in host[1..].iter().zip(&device[1..]) {
        let [a, b]: [f64; 2] = [host, device].map(|row| row[kl].parse().unwrap());
        assert!((a - b).abs() <= 0.02 * a + 1e-6, "{host:?} {device:?}");
    }
}

/// Answers, choices and scores: a prompt fills all caches at once, and sequences of one method go together.
#[test]
fn tasks_are_scored_on_a_device() {
    let place = Place::new();
    // Short prompts: an emulated device is slow.
    let tasks = [
        "tasks = [\"gsm8k\", \"coqa\", \"truthfulqa\", \"longbench/lcc\"]\nlimit = 3",
        "limits = { coqa = 1, \"longbench/lcc\" = 1 }",
    ];
    let few = ["tasks = [\"truthfulqa\", \"longbench/lcc\"]\nlimit = 1", ""];
    place.write("a.toml", &ACCURACY.replace(tasks[0], few[0]).replace(tasks[1], few[1]));
    let run = |results: &str, more: &[&str]| {
        let args = ["run", "a.toml", "--results", results, "--set", "model.weights=f32"];
        place.done(&[&args[..], more].concat());
        untimed(&place.path(&format!("{results}/sample/a/cells.csv")))
    };
    let (host, device) = (run("host", &[]), run("device", &["--device", "emulated:0"]));
    let score = host[0].iter().position(|name| name == "score").unwrap();
    assert_eq!(host.len(), device.len());
    let same = host.iter().zip(&device).filter(|(host, device)| host[score] == device[score]).count();
    // A token may come out otherwise where two are as likely.
    assert!(host.len() - same <= 1, "{host:?} {device:?}");
    let made = std::fs::read_to_string(place.path("device/sample/a/made.json")).unwrap();
    assert!(made.contains("\"device\": \"emulated"), "{made}");
    // Rows of a device are not held to the last digit.
    place.done(&["compare", "host", "device"]);
}

#[test]
fn kernels_can_be_written_out() {
    let room = Room::new();
    let said = room.done(&["device-check", "--sources", "kernels"]);
    assert!(said.contains("files of kernels"), "{said}");
    let files: Vec<_> = std::fs::read_dir(room.path("kernels")).unwrap().flatten().collect();
    assert!(files.len() > 50 && files.iter().all(|f| f.file_name().to_string_lossy().ends_with(".cu")));
}
