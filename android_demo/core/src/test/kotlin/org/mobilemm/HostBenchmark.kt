package org.mobilemm

import java.io.File
import kotlin.system.exitProcess

/**
 * Measures a bundle on this computer's JVM as the app does on a phone: a folder that stands for the app's external
 * files, then the extras of `am start`, as in `FOLDER --es bundle NAME --es out result.json --ei runs 5`.
 */
fun main(arguments: Array<String>) {
    val files = BenchmarkFolder(File(arguments[0]))
    val extras = arguments.drop(1).chunked(3).associate { (_, name, value) -> name to value }
    val settings = BenchmarkSettings.of { extras[it]?.toInt() }
    try {
        files.write(extras.getValue("out")) { report ->
            val benchmark = Benchmark(files.bundle(extras.getValue("bundle")), settings, Computer())
            benchmark.run {
                println(it)
                report(it)
            }
        }
    } catch (error: MobileMMError) {
        System.err.println("failed: ${error.message}")
        exitProcess(1)
    }
}
