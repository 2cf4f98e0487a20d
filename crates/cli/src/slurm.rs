//! Job scripts for Slurm, and `sbatch`.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use minicache_config::Slurm;

use crate::call::quoted;
use crate::failure::usage;

/// What the scripts of a sweep have in common.
pub(crate) struct Scripts<'a> {
    /// The site.
    pub(crate) site: &'a Slurm,
    /// Where the call was made: relative paths in it are from there.
    pub(crate) cwd: &'a Path,
    /// The folder of scripts and logs.
    pub(crate) dir: &'a Path,
    /// This program.
    pub(crate) program: &'a Path,
    /// The call of `minicache run`, its words without the program.
    pub(crate) call: &'a [String],
    /// The file with the shares.
    pub(crate) shares: &'a Path,
    /// Tasks in all.
    pub(crate) tasks: usize,
}

impl Scripts<'_> {
    /// The array: every task computes its share, passes signals on to the run, and is queued again where that is not
    /// done.
    pub(crate) fn array(&self) -> String {
        let site = self.site;
        let limit = site.array_limit.map(|n| format!("%{n}")).unwrap_or_default();
        let mut lines = self.head("minicache", site.partition.as_deref());
        let mut option = |text: String| lines.push(format!("#SBATCH {text}"));
        option(format!("--array=1-{}{limit}", self.tasks));
        option(format!("--output={}", self.log("task-%a.log")));
        // To the shell of the job alone, which passes it on.
        option(format!("--signal=B:USR1@{}", site.warning));
        option(if site.requeue { "--requeue" } else { "--no-requeue" }.to_string());
        if let Some(gpus) = &site.gpus {
            option(format!("--gpus={gpus}"));
        }
        if let Some(memory) = &site.memory {
            option(format!("--mem={memory}"));
        }
        if let Some(constraint) = &site.constraint {
            option(format!("--constraint={constraint}"));
        }
        lines.extend(self.setting());
        let run = self.run(&[
            "--shard".into(),
            format!("\"$SLURM_ARRAY_TASK_ID\"/{}", self.tasks),
            "--shares".into(),
            word(self.shares),
        ]);
        lines.push(format!("{run} &"));
        lines.push(FORWARD.trim().to_string());
        if site.requeue {
            lines.push(REQUEUE.trim().replace("RESTARTS", &site.restarts.to_string()));
        }
        lines.push("exit \"$code\"\n".into());
        lines.join("\n")
    }

    /// The last job: puts everything together and writes the reports.
    pub(crate) fn report(&self) -> String {
        let partition = self.site.report_partition.as_ref().or(self.site.partition.as_ref());
        let mut lines = self.head("minicache-report", partition.map(String::as_str));
        lines.push(format!("#SBATCH --output={}", self.log("report.log")));
        lines.extend(self.setting());
        lines.push(format!("exec {}\n", self.run(&["--collect".into()])));
        lines.join("\n")
    }

    fn log(&self, name: &str) -> String {
        // A percent sign would begin a pattern.
        format!("{}/{name}", self.dir.display().to_string().replace('%', "%%"))
    }

    fn head(&self, name: &str, partition: Option<&str>) -> Vec<String> {
        let site = self.site;
        let mut lines = vec!["#!/bin/bash".to_string()];
        let mut option = |name: &str, value: Option<&String>| {
            lines.extend(value.map(|value| format!("#SBATCH --{name}={value}")));
        };
        option("job-name", Some(&name.to_string()));
        option("partition", partition.map(str::to_string).as_ref());
        option("account", site.account.as_ref());
        option("qos", site.qos.as_ref());
        option("time", site.time.as_ref());
        option("cpus-per-task", site.cpus.map(|n| n.to_string()).as_ref());
        option("open-mode", Some(&"append".to_string()));
        lines.extend(site.options.iter().map(|option| format!("#SBATCH {option}")));
        lines
    }

    /// What comes before the call.
    fn setting(&self) -> Vec<String> {
        let mut lines = vec![format!("cd {} || exit 2", word(self.cwd))];
        lines.extend(self.site.modules.iter().map(|module| format!("module load {module}")));
        let variables = self.site.environment.iter();
        lines.extend(variables.map(|(name, value)| format!("export {name}={}", quoted(value))));
        lines
    }

    /// The call with `more` at its end, which a shell reads as it is.
    fn run(&self, more: &[String]) -> String {
        let mut words: Vec<String> = self.site.container.iter().cloned().collect();
        words.push(word(self.program));
        words.extend(self.call.iter().map(|word| quoted(word)));
        words.extend(more.iter().cloned());
        words.join(" ")
    }
}

fn word(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

/// `wait` returns when a signal comes, and again when the run has ended.
const FORWARD: &str = r#"
run=$!
trap 'kill -USR1 "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM
while :; do
    wait "$run"
    code=$?
    kill -0 "$run" 2>/dev/null || break
done
"#;

/// 138 and 143: the run was asked to stop (SIGUSR1, SIGTERM). 137: it was killed. A job that somebody has cancelled is not
/// running any more, and stays cancelled.
const REQUEUE: &str = r#"
again=no
case $code in
    138 | 143) again=yes ;;
    137) [ "${SLURM_RESTART_COUNT:-0}" -lt RESTARTS ] && again=yes ;;
esac
if [ "$again" = yes ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)" = RUNNING ]; then
    echo "minicache: exit code $code; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
"#;

/// Submits a script, and gives the number of its job.
pub(crate) fn submit(script: &Path, options: &[String]) -> Result<String> {
    let sbatch = Command::new("sbatch").arg("--parsable").args(options).arg(script).output();
    let out = match sbatch {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let mend = "submit where Slurm is, or share the work yourself: `minicache run --shard I/N`";
            return Err(usage(format!("sbatch: there is no such program here; {mend}")));
        }
        out => out.map_err(|e| anyhow::anyhow!("sbatch: {e}"))?,
    };
    let said = String::from_utf8_lossy(&out.stderr);
    if !out.status.success() {
        bail!("{}: sbatch refused it: {}", script.display(), said.trim());
    }
    // `JOB` or `JOB;CLUSTER`.
    let text = String::from_utf8_lossy(&out.stdout);
    let job = text.trim().split(';').next().unwrap_or_default().to_string();
    if job.is_empty() || !job.bytes().all(|b| b.is_ascii_digit()) {
        bail!("{}: sbatch gave no number of a job but `{}`", script.display(), text.trim());
    }
    Ok(job)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn scripts(site: &Slurm) -> [String; 2] {
        let call = ["run", "e.toml", "--set", "a=[1, 2]"].map(str::to_string);
        let scripts = Scripts {
            site,
            cwd: Path::new("/home/me/my work"),
            dir: Path::new("/home/me/results/.jobs/1%"),
            program: Path::new("/opt/minicache"),
            call: &call,
            shares: Path::new("/home/me/results/.jobs/1%/shares.json"),
            tasks: 7,
        };
        [scripts.array(), scripts.report()]
    }

    #[test]
    fn scripts_say_what_the_site_wants() {
        let site = Slurm::from_toml(
            "partition = \"gpu\"\nreport_partition = \"cpu\"\ngpus = 1\ntime = \"1:00:00\"\narray_limit = 3\nmodules = [\"cuda/12\"]\n\
             container = \"apptainer exec --nv m.sif\"\noptions = [\"--exclusive\"]\nenvironment = { A = \"it's\" }",
        )
        .unwrap();
        let [array, report] = scripts(&site);
        for line in [
            "#!/bin/bash",
            "#SBATCH --partition=gpu",
            "#SBATCH --array=1-7%3",
            "#SBATCH --output=/home/me/results/.jobs/1%%/task-%a.log",
            "#SBATCH --gpus=1",
            "#SBATCH --exclusive",
            "#SBATCH --requeue",
            "cd '/home/me/my work' || exit 2",
            "module load cuda/12",
            r"export A='it'\''s'",
        ] {
            assert!(array.lines().any(|l| l == line), "no `{line}` in {array}");
        }
        let run = "apptainer exec --nv m.sif /opt/minicache run e.toml --set 'a=[1, 2]' --shard \"$SLURM_ARRAY_TASK_ID\"/7 ";
        assert!(array.contains(run), "{array}");
        assert!(array.contains("-lt 3 ]") && array.contains("scontrol requeue"), "{array}");
        assert!(report.contains("#SBATCH --partition=cpu") && !report.contains("--gpus"), "{report}");
        assert!(report.ends_with("run e.toml --set 'a=[1, 2]' --collect\n"), "{report}");
        let [array, _] = scripts(&Slurm { requeue: false, ..Slurm::default() });
        assert!(array.contains("--no-requeue") && !array.contains("scontrol"), "{array}");
    }

    /// Runs the array's script with a run of our own in place of the program, and a made-up Slurm.
    fn ended(run: &str, state: &str, restarts: &str, signal: Option<&str>) -> (Option<i32>, String) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        put("squeue", &format!("echo {state}"));
        put("scontrol", "echo \"$@\" >&2");
        let program = put("program", run);
        let site = Slurm::default();
        let scripts = Scripts {
            site: &site,
            cwd: dir.path(),
            dir: dir.path(),
            program: &program,
            call: &[],
            shares: Path::new("f"),
            tasks: 1,
        };
        let script = put("job", &scripts.array());
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let mut bash = Command::new("bash");
        bash.arg(script).env("PATH", path).env("SLURM_JOB_ID", "42").env("SLURM_ARRAY_TASK_ID", "1");
        bash.env("SLURM_RESTART_COUNT", restarts);
        let child =
            bash.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        if let Some(signal) = signal {
            while !dir.path().join("ready").exists() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        }
        let out = child.wait_with_output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).trim().to_string())
    }

    #[test]
    fn a_task_is_queued_again_where_it_was_interrupted_and_not_where_it_failed_or_was_cancelled() {
        let again = "requeue 42";
        assert_eq!(ended("exit 0", "RUNNING", "0", None), (Some(0), String::new()));
        assert_eq!(ended("exit 1", "RUNNING", "0", None), (Some(1), String::new()));
        assert_eq!(ended("exit 138", "RUNNING", "9", None), (Some(138), again.into()));
        assert_eq!(ended("exit 143", "COMPLETING", "0", None), (Some(143), String::new()));
        let killed = |restarts| ended("kill -9 $$", "RUNNING", restarts, None);
        assert_eq!((killed("2").0, killed("3").0), (Some(137), Some(137)));
        assert!(killed("2").1.ends_with(again) && !killed("3").1.contains(again));
        // The run ends in its own time, with what it was doing.
        let run = "trap 'sleep 0.2; exit 138' USR1; touch ready; while :; do sleep 0.05; done";
        assert_eq!(ended(run, "RUNNING", "0", Some("-USR1")), (Some(138), again.into()));
    }
}
