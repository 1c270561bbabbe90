package org.mobilemm

import java.io.File

/** Measures a bundle on this computer's JVM as the app does on a phone: BUNDLE OUT THREADS RUNS. */
fun main(arguments: Array<String>) {
    val (bundle, out, threads, runs) = arguments
    val settings = BenchmarkSettings(threads = threads.toInt(), runs = runs.toInt())
    val result = Benchmark(Bundle.open(File(bundle)), settings, Computer()).run { println(it) }
    File(out).writeText(Json.write(listOf(result), indent = 1))
}
