// A Python interpreter in WebAssembly:
//
//   node python.mjs PYODIDE SOURCE (FILE | -c CODE)
//
// PYODIDE is the folder of that package, SOURCE goes on the module search path.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [pyodide, source, first, code] = process.argv.slice(2);
const { loadPyodide } = await import(pathToFileURL(`${pyodide}/pyodide.mjs`));
const python = await loadPyodide();
python.FS.mkdir("/source");
python.FS.mount(python.FS.filesystems.NODEFS, { root: source }, "/source");
python.runPython("import sys; sys.path.insert(0, '/source'); sys.dont_write_bytecode = True");
try {
    python.runPython(first === "-c" ? code : readFileSync(first, "utf8"));
} catch (error) {
    console.error(error.message);
    process.exitCode = 1;
}
